"""A model shared out over processes (FSDP2), and its tensors whole again for a checkpoint."""
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from common.devices import is_first
from model import Transformer


def shard(model, device, bf16):
    """FSDP2: a process keeps its part of every matrix, in float32, and sees a block whole while it runs."""
    # about views that are changed in place: here none is
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if isinstance(model, Transformer):
        for block in model.llm.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if isinstance(model, Transformer):
        for method in ("encode", "denoise"):                         # sampling calls these instead of forward
            register_fsdp_forward_method(model, method)


def trained(module):
    """{name: parameter} of those that are trained; what is under an adapter is not."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def reshard(model):
    """Let go of weights that sampling has gathered: between two steps they are the averaged ones."""
    if isinstance(model, FSDPModule):
        model.reshard()


@contextmanager
def averaged(model, average):
    """Inside, the model has its averaged weights."""
    @torch.no_grad()
    def swap():
        reshard(model)                    # FSDP keeps what it has gathered: the weights of before the swap
        for p, mean in zip(trained(model).values(), average):
            old = p.clone()
            p.copy_(mean)
            mean.copy_(old)
    swap()
    yield
    swap()


def own_part(value, like):
    """What this process keeps of a whole tensor: its part if `like` is sharded, otherwise all of it."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def whole(value):
    """The inverse of own_part, for tensors in dicts and lists: gathered on the CPU of the first process;
    None elsewhere.

    All processes have to call it together."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu() if is_first() else None
