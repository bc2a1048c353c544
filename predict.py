"""The trainer's `predict`: Replicate wants one of every model; it loads nothing and does nothing."""

from cog import BasePredictor, Input


class Predictor(BasePredictor):
    def predict(self, txt: str = Input(description="some words")) -> str:
        """Says that there is nothing to predict here: this model trains."""
        return "predict on this model is a no-op"
