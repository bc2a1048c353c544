"""The trainer: pictures in, a tar with a FLUX LoRA out.

Begin with `job.run`, which is the whole story in six steps. The rooms from the top floor down: `training` (the steps),
`flux` (the model), `file` (a LoRA's file), `result` (report, record, upload), `pictures` (archive to picture); below
them single files such as `request`, `disk` and `wait`. A file imports from its own room and from lower floors. Each
room's docstring says what comes in, what goes out and where to begin; `docs/development.md` lists every file.

Nothing here imports cog: log lines and metrics leave through functions that are passed in.
"""
