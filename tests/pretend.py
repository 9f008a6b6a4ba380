"""A card for machines that have none: tensors on it say that they are on another device, compute on
the CPU, and refuse company from the CPU as CUDA does.

    with Card() as card:
        model = card.put(model)          # its weights are on the card now
        torch.zeros(3, device=DEVICE)    # a tensor on the card
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")  # the one device, besides the CPU, whose graphs any build runs
aten = torch.ops.aten
# What CUDA takes from the CPU: copies, and numbers of rows to choose.
CROSSING = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_,
            aten._index_put_impl_}


class OnCard(torch.Tensor):
    """A tensor that says it is on DEVICE; its numbers are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnCard({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def call(func, args, kwargs):
    """One operation, on the card if any of its tensors or its `device` is."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_card = [x for x in tensors if isinstance(x, OnCard)]
    on_cpu = [x for x in tensors if not isinstance(x, OnCard) and x.dim() > 0]
    if on_card and on_cpu and func.overloadpacket not in CROSSING:
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (on_card, on_cpu)]
        raise RuntimeError(f"{func}: tensors on the card and on the CPU: {shapes}")
    device = kwargs.get("device")
    to_card = bool(on_card) if device is None else on_the_card(device)
    if not on_card and not to_card:
        return func(*args, **kwargs)
    if device is not None:
        kwargs = kwargs | dict(device="cpu")
    held_args, held_kwargs = pytree.tree_map_only(OnCard, lambda x: x.held, (args, kwargs))
    out = func(*held_args, **held_kwargs)
    if func.overloadpacket is aten.copy_ and not isinstance(args[0], OnCard):
        return args[0]  # to the CPU
    if to_card:
        out = pytree.tree_map_only(torch.Tensor, OnCard, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_card and to_card else out


class Numbers(TorchFunctionMode):
    """What never reaches an operation: lists made into tensors, and tensors into lists."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], OnCard):
            return args[0].held.tolist()
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnCard):
            return OnCard(args[0].held.new_tensor(*args[1:], **kwargs))
        if func in (torch.tensor, torch.as_tensor) and on_the_card(kwargs.get("device")):
            if isinstance(args[0], OnCard):
                return args[0].to(kwargs.get("dtype", args[0].dtype))
            return OnCard(func(*args, **kwargs | dict(device="cpu")))
        return func(*args, **kwargs)


def on_the_card(device) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


class Generator(torch.Generator):
    """Of the CPU's random numbers, also for the card."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if on_the_card(device) else device)


class Card(TorchDispatchMode):
    """While it is entered, DEVICE is a card. waits: how often a number of its was asked for, which
    on a true card waits for all that was begun."""

    def __init__(self):
        super().__init__()
        self.numbers, self.waits = Numbers(), 0

    def __enter__(self):
        self.numbers.__enter__()
        torch.Generator = Generator
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.Generator = Generator.__base__
        self.numbers.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func.overloadpacket is aten._local_scalar_dense
        return call(func, args, kwargs or {})

    def put(self, model):
        """The model, its weights moved to the card."""
        for name, p in list(model.named_parameters()):
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(OnCard(p.detach().clone())))
        return model
