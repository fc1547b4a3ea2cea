"""The whole method on a pretend accelerator, so that machines without a GPU find tensors on the
wrong device, too.

The pretend device is PyTorch's PrivateUse1: its tensors hold CPU values, say that they are
elsewhere, and mix with CPU tensors only where CUDA's do. As the values are the CPU's, a run on it
must end with the very numbers of a run on the CPU. It cannot tell a GPU's rounding, speed or
memory. It lives in a process of its own, as it renames a backend of PyTorch for good.
"""

import json
import sys

import pytest
import torch
from processes import ENV, Process
from test_lofi_tal import arguments, result_of
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import checkpoint
import localize
import lofi_tal
from localizer import Distributed
from tools.make_toy import Toy, make_toy

DEVICE = "pretend"
# Of newer PyTorch, and said to be experimental.
SETUP = "_setup_privateuseone_for_python_backend"
COPIES = {"copy_", "_to_copy"}  # may cross
# What makes the program wait for the device, as its result has a size or value that the CPU needs.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"}
waits = []  # the names of those since the last step of a training
# Indices of a device's tensor may lie on the CPU.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the pretend device; `values` is the CPU tensor behind it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        options = {"dtype": values.dtype, "device": "meta"}
        shell = torch.empty_strided(values.shape, values.stride(), **options)
        place = {"dispatch_device": True, "device_for_backend_keys": torch.device(DEVICE, 0)}
        return torch.Tensor._make_subclass(cls, shell, False, **place)

    def __init__(self, values):
        self.values = values

    def data_ptr(self):
        return self.values.data_ptr()

    def tolist(self):
        waits.append("tolist")
        return self.values.tolist()

    def numpy(self):
        raise TypeError("a tensor on the device has no numpy()")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def is_there(x):
    return isinstance(x, Elsewhere)


def values_of(x):
    return x.values if is_there(x) else x


def check_devices(name, args, tensors):
    """Raise RuntimeError where CUDA would not take tensors on two devices."""
    there = any(map(is_there, tensors))
    # A scalar tensor may lie on the CPU.
    mixed = there and any(x.dim() for x in tensors if not is_there(x))
    if name in INDEXING:
        mixed = there and not is_there(args[0])
        if len(args) > 2 and args[2].dim():
            mixed = mixed or is_there(args[2]) != is_there(args[0])
    if mixed and name not in COPIES:
        places = [f"{tuple(x.shape)} {'device' if is_there(x) else 'cpu'}" for x in tensors]
        raise RuntimeError(f"{name} got tensors on two devices: {', '.join(places)}")


def waits_for_device(name, args, tensors, there):
    """Return whether an operation on a GPU's tensors ends only when the GPU has come so far.

    there: whether its result is on the device.
    """
    if name in INDEXING:
        masks = [x for x in tree_leaves(args[1]) if is_there(x)]
        return any(x.dtype in (torch.bool, torch.uint8) for x in masks)
    if name == "copy_":
        return is_there(args[1]) and not is_there(args[0])
    copied_back = name in COPIES and not there
    return any(map(is_there, tensors)) and (name in WAITS or copied_back)


def compute(func, args, kwargs):
    """Run an operation on the values behind its arguments; what it returns is where its arguments
    are, or where it is asked to be."""
    if func is torch.ops.prim.device.default:
        return torch.device(DEVICE, 0)
    name = func._overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    check_devices(name, args, tensors)
    there = any(map(is_there, tensors))
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if waits_for_device(name, args, tensors, there):
        waits.append(name)
    if there and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{name} got a generator of the CPU for a tensor on the device")
    args, kwargs = tree_map(values_of, (args, kwargs))
    out = func(*args, **kwargs)
    if not there or name == "_local_scalar_dense":
        return out
    # What an operation in place returns is its argument.
    own = {id(values_of(x)): x for x in tensors}

    def put(x):
        if id(x) in own:
            return own[id(x)]
        return Elsewhere(x) if isinstance(x, torch.Tensor) else x

    return tree_map(put, out)


class OnDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def set_up():
    getattr(backend_registration, SETUP)(DEVICE)
    torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.autograd.set_multithreading_enabled(False)  # the mode is this thread's
    # Two that ask a real backend for memory.
    make, save = torch.tensor, torch.save

    def tensor(x, device=None, **options):
        return make(x, **options).to(device or "cpu")

    def to_save(x):
        return getattr(x.data, "values", x) if isinstance(x, torch.nn.Parameter) else values_of(x)

    torch.tensor = tensor
    torch.save = lambda obj, file: save(tree_map(to_save, obj), file)


def check_the_device():
    """Assert that what CUDA refuses is refused, and what it takes is taken."""
    a, b = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
    zero = torch.zeros(1, dtype=torch.int64)
    wrong = [
        lambda: a + b,
        lambda: b[a.long()],
        lambda: a.index_select(0, zero),
        lambda: torch.stack([a, b]),
        lambda: a.numpy(),
        lambda: torch.rand(2, generator=torch.Generator(), device=DEVICE),
    ]
    for operation in wrong:
        with pytest.raises((RuntimeError, TypeError)):
            operation()
    assert (a[zero] + torch.tensor(1.0)).tolist() == [[2.0, 2.0, 2.0]]
    waits.clear()
    assert a.cpu().device.type == "cpu" and float(a[zero, 0]) == 1 and len(a[a > 0]) == 6
    assert waits == ["_to_copy", "_local_scalar_dense", "index"]


def count_waits(steps):
    """Append to `steps` a line of each training step: its title, number and what waited in it."""
    batches, end_step = checkpoint.Progress.batches, checkpoint.Progress.end_step

    def counted_batches(self, loader):
        for batch in batches(self, loader):
            waits.clear()
            yield batch

    def counted_end(self, losses):
        steps.append([self.title, self.step, *waits])
        end_step(self, losses)

    checkpoint.Progress.batches = counted_batches
    checkpoint.Progress.end_step = counted_end


def main(out, video, *argv):
    """Run lofi_tal.py with the arguments `argv` on the device; then localize a video with `out`."""
    set_up()
    steps = []
    count_waits(steps)
    with OnDevice():
        check_the_device()
        ddp = Distributed(0, 1, torch.device(DEVICE))
        lofi_tal.setup_distributed = lambda cfg: ddp
        lofi_tal.main(argv)
        with open(f"{out}/waits.json", "w") as file:
            json.dump(steps, file)
        with open(f"{out}/localized.json", "w") as file:
            json.dump(localize.localize(localize.load(out, DEVICE), video), file)


@pytest.mark.skipif(not hasattr(backend_registration, SETUP), reason="needs a newer PyTorch")
def test_no_stage_mixes_devices(tmp_path):
    """Every stage, and a video localized alone, on both devices: the same numbers."""
    toy, video = str(tmp_path / "toy"), str(tmp_path / "toy/frames/toy_00009.zip")
    make_toy(toy, Toy(train=8, val=4, clips=16, stills=24, size=20, snippets=16), workers=0)
    overrides = [
        "stages=[pretrain, lofi, features, sola, head, detect]",
        "pretrain.method=acp_plus_background",
        "lofi.chunk_snippets=5",
        "lofi.epochs=2",
        "lofi.batch_size=8",
        "lofi.accumulate=2",
        "sola={epochs: 1, batch_size: 8, subsequence: 6, positions: [2, 3, 4]}",
        "head.epochs=2",
    ]
    outs = [str(tmp_path / name) for name in ("cpu", "device")]
    command = [__file__, outs[1], video, *arguments(toy, outs[1], *overrides)]
    process = Process(*command, env={**ENV, "PYTHONPATH": "."})
    lofi_tal.main(arguments(toy, outs[0], *overrides))  # at the same time
    assert process.wait() == 0, process.read(2)[-3000:]
    assert result_of(outs[1]) == result_of(outs[0])
    with open(f"{outs[1]}/waits.json") as file:
        steps = json.load(file)
    titles = {title.partition(" ")[0] for title, *_ in steps}
    assert titles == {"acp", "acp_plus_background", "lofi", "sola", "head"}
    # Losses, gradient norm and flags come in one transfer; nothing else waits for the device.
    assert [step for step in steps if step[2:] != ["tolist"]] == []
    expected = localize.localize(localize.load(outs[0]), video)
    with open(f"{outs[1]}/localized.json") as file:
        assert json.load(file) == expected


if __name__ == "__main__":
    main(*sys.argv[1:])
