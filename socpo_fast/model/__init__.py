"""The decoder that rollout and training share, and its way from and to Hugging Face folders.

Read config.py -> decoder.py -> weights.py; accumulate.py holds training's backward of its layers.
"""

from socpo_fast.model.config import ModelConfig
from socpo_fast.model.decoder import Decoder, packed_forward
from socpo_fast.model.weights import load_student, save_student

__all__ = ["Decoder", "ModelConfig", "load_student", "packed_forward", "save_student"]
