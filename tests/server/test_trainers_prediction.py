"""The trainer's prediction, in a file that comes late: it takes the generator's place in the worker."""

import replicate


def test_the_trainers_prediction_says_that_it_does_nothing(client: replicate.Client) -> None:
    assert client.run("replicate/fast-flux-trainer", input={"txt": "some words"}) == (
        "predict on this model is a no-op"
    )
