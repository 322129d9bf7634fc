from socpo_fast.model.config import ModelConfig
from socpo_fast.model.decoder import Decoder, packed_forward
from socpo_fast.model.weights import load_student, save_student

__all__ = ["Decoder", "ModelConfig", "load_student", "packed_forward", "save_student"]
