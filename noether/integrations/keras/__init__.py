"""noether's callbacks in `model.fit` of Keras 3, with torch as its backend."""

from noether.integrations.keras.callback import NoetherCallback

__all__ = ["NoetherCallback"]
