"""The training: from encoded pictures and prompts to the weights of a LoRA.

In: `work.Material` (examples, prompts, layers) and `fit.Settings`. Out: saved weights, previews, the loss curve.
Begin with `learn` (the order of things) and `fit` (the loop; `full`: of whole weights); `prior` is prior preservation,
`words` what its prompts say, `examine` what the verdict measures, `graphs` recorded CUDA passes, `watch` and `tracker`
what is told, `resume` and `state` what a training goes on from: a LoRA, an unfinished training; `ranks` several GPUs.
"""
