"""The decoder that rollout and training share, and its way from and to Hugging Face.

Read config.py -> decoder.py -> weights.py (folders); accumulate.py holds training's backward of its
layers. adopt.py and shared.py are about live transformers models, hf_views.py has their names.
"""

from socpo_fast.model.adopt import adopt_student
from socpo_fast.model.config import ModelConfig
from socpo_fast.model.decoder import Decoder, packed_forward
from socpo_fast.model.weights import load_student, save_student

__all__ = [
    "Decoder",
    "ModelConfig",
    "adopt_student",
    "load_student",
    "packed_forward",
    "save_student",
]
