"""The architectures, on torch and transformers alone: vanilla Llama, recursive, Mixture-of-Recursions."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .config import MoRConfig
from .modeling import MoRForCausalLM, MoRModel

AutoConfig.register("mor", MoRConfig, exist_ok=True)
AutoModel.register(MoRConfig, MoRModel, exist_ok=True)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)

__all__ = ["MoRConfig", "MoRForCausalLM", "MoRModel"]
