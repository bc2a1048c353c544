"""FLUX.1: the model on this machine, made ready for training and for drawing.

In: a base (a folder or an id on the Hub) and a GPU or none. Out: latents and embeddings, a transformer with a LoRA
attached, pictures. Begin with `hardware` (the plan), `base` (find and lend the model) and `encode`; `flow` has the
mathematics. `forward`, `layer`, `rotary` and `kernels` make diffusers' numbers in fewer passes over memory;
`attention` checks the GPU's own. Drawing is `generate` on a `canvas`, with `schnell` too; `safety` looks at the result.
"""
