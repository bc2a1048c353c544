"""The trainer. One request flows one way: request -> archive -> photos -> survey -> captions -> buckets -> encode ->
prior -> adapter -> fit -> report -> the tar; `job.run` is the whole story, and the README's tree says what each file is
for. Nothing here imports cog: log lines and metrics go out through functions that are passed in.
"""
