"""The training: from encoded pictures and prompts to the weights of a LoRA.

In: `work.Material` (examples, prompts, layers) and `fit.Settings`. Out: saved weights, previews, the loss curve.
Begin with `learn` (the order of things) and `fit` (optimizer and loop); `prior` is prior preservation, `words` what its
prompts say, `examine` what the verdict measures, `graphs` the recorded CUDA passes, `watch` and `tracker` what is told
meanwhile, `resume` the LoRA that a training goes on from, `state` what an unfinished training goes on from, `ranks`
several GPUs.
"""
