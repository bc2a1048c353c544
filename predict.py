"""The trainer's `predict`, which does nothing: Replicate asks every model for one. `generate.py` draws."""

from cog import BasePredictor, Input


class Predictor(BasePredictor):
    def predict(self, txt: str = Input(description="some words")) -> str:
        """Says that there is nothing to predict here: this model trains."""
        return "predict on this model is a no-op"
