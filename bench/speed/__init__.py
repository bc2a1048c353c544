"""What `script/bench step` is made of.

`case` is what is trained on, `model` a transformer and data of that shape, `ways` the ways to train, `measure` takes
their times by turns, `verdict` says what the times mean.
"""
