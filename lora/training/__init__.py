"""The training: from encoded pictures and prompts to the weights of a LoRA.

In: `work.Material` (examples, prompts, layers) and `fit.Settings`. Out: saved weights, previews, the loss curve.
Begin with `learn` (the order of things) and `fit` (optimizer and loop); `prior` is prior preservation, `words` its
prompts, `examine` what the verdict measures, `graphs` the recorded passes, `watch` and `tracker` what is told
meanwhile, `resume` an earlier LoRA to go on from, `state` an unfinished training, `ranks` several GPUs.
"""
