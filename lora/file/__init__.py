"""A LoRA's file: where it comes from, how its layers are named, what it holds.

In: a path, an https address, an id on the Hugging Face Hub. Out: `weights.Weights`, layers under diffusers' names.
Begin with `names` (the layouts: diffusers, BFL, kohya), then `weights` (read, write, judge) and `source` (fetch;
`cache` keeps the last). Files of strangers are hostile until they are checked.
"""
