"""The whole method on a pretend accelerator, so that machines without a GPU find tensors on the wrong device, too.

The pretend device is PyTorch's PrivateUse1: its tensors hold CPU values, say that they are elsewhere, and mix with CPU tensors only where
CUDA's do. As the values are the CPU's, a run on it must end with the very numbers of a run on the CPU. It cannot tell a GPU's rounding,
speed or memory. It lives in a process of its own, as it renames a backend of PyTorch for good.
"""
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import engine
import localize
import lofi_tal
import sola
import toy
import train_sola
from test_lofi_tal import ENV, arguments, result_of

DEVICE = "pretend"
SETUP = "_setup_privateuseone_for_python_backend"  # of newer PyTorch, and said to be experimental
COPIES = {"copy_", "_to_copy"}  # may cross
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # indices of a device's tensor may lie on the CPU


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the pretend device; `values` is the CPU tensor behind it."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        shell = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, shell, False, dispatch_device=True, device_for_backend_keys=torch.device(DEVICE, 0))

    def __init__(self, values):
        self.values = values

    def data_ptr(self):
        return self.values.data_ptr()

    def tolist(self):
        return self.values.tolist()

    def numpy(self):
        raise TypeError("a tensor on the device has no numpy()")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def check_devices(name, args, tensors):
    here, there = ([t for t in tensors if isinstance(t, Elsewhere) == which] for which in (False, True))
    mixed = there and any(t.dim() for t in here)  # a scalar tensor may lie on the CPU
    if name in INDEXING:
        mixed = there and not isinstance(args[0], Elsewhere) or len(args) > 2 and args[2].dim() and isinstance(args[2], Elsewhere) != isinstance(args[0], Elsewhere)
    if mixed and name not in COPIES:
        raise RuntimeError(f"{name} got tensors on two devices: " + ", ".join(f"{tuple(t.shape)} {'device' if isinstance(t, Elsewhere) else 'cpu'}" for t in tensors))


def compute(func, args, kwargs):
    """An operation on the values behind its arguments; what it gives is where its arguments are, or where it is asked to be."""
    if func is torch.ops.prim.device.default:
        return torch.device(DEVICE, 0)
    name, tensors = func._overloadpacket.__name__, [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    check_devices(name, args, tensors)
    there = any(isinstance(t, Elsewhere) for t in tensors)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if there and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{name} got a generator of the CPU for a tensor on the device")
    args, kwargs = tree_map(lambda t: t.values if isinstance(t, Elsewhere) else t, (args, kwargs))
    out = func(*args, **kwargs)
    if not there or name == "_local_scalar_dense":
        return out
    own = {id(t.values if isinstance(t, Elsewhere) else t): t for t in tensors}  # what an operation in place gives back is its argument
    return tree_map(lambda t: own[id(t)] if id(t) in own else Elsewhere(t) if isinstance(t, torch.Tensor) else t, out)


class OnDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def set_up():
    getattr(backend_registration, SETUP)(DEVICE)
    torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.autograd.set_multithreading_enabled(False)  # the mode is this thread's
    make, save = torch.tensor, torch.save  # two that ask a real backend for memory
    torch.tensor = lambda x, device=None, **options: make(x, **options).to(device or "cpu")
    values = lambda t: getattr(t.data, "values", t) if isinstance(t, torch.nn.Parameter) else t.values if isinstance(t, Elsewhere) else t
    torch.save = lambda obj, f: save(tree_map(values, obj), f)


few = partial(sola.linear_probe, iterations=5)  # each operation takes its time there


def main(argv):
    """The run's folder, a video to localize with it, and the arguments of lofi_tal.py."""
    set_up()
    train_sola.linear_probe = few
    with OnDevice():
        a = torch.ones(2, 3, device=DEVICE)
        for wrong in (lambda: a + torch.ones(2, 3), lambda: torch.ones(2, 3)[a.long()], lambda: a.index_select(0, torch.zeros(1, dtype=int)), lambda: torch.stack([a, torch.ones(2, 3)]),
                      lambda: a.numpy(), lambda: torch.rand(2, generator=torch.Generator(), device=DEVICE)):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert (a[torch.tensor([0])] + torch.tensor(1.0)).tolist() == [[2.0, 2.0, 2.0]] and a.cpu().device.type == "cpu"
        engine.start_process = lambda device, precision: engine.Process(0, 1, torch.device(DEVICE), precision)
        lofi_tal.main(argv[2:])
        with open(f"{argv[0]}/localized.json", "w") as f:
            json.dump(localize.localize(localize.load(argv[0], DEVICE), argv[1]), f)


@pytest.mark.skipif(not hasattr(backend_registration, SETUP), reason=f"needs {SETUP} of a newer PyTorch")
def test_no_stage_mixes_devices(tmp_path, monkeypatch):
    """Every stage, and a video localized alone, on the pretend device and on the CPU: the same numbers."""
    monkeypatch.setattr(train_sola, "linear_probe", few)
    toy_data, video = str(tmp_path / "toy"), str(tmp_path / "toy/frames/toy_00009.zip")
    toy.make_toy(toy_data, workers=1, train=8, val=4, clips=16, stills=24, size=20, snippets=16)
    more = ["stages=[pretrain,lofi,features,sola,head,detect]", "pretrain.method=acp_plus_background", "lofi.chunk=5", "lofi.epochs=2", "lofi.batch_size=8", "lofi.accumulate=2", "head.epochs=2",
            "sola.epochs=1", "sola.batch_size=8", "sola.subsequence=6", "sola.positions=[2,3,4]"]
    outs = [str(tmp_path / name) for name in ("cpu", "device")]
    lofi_tal.main(arguments(toy_data, outs[0], *more))
    process = subprocess.run([sys.executable, __file__, outs[1], video, *arguments(toy_data, outs[1], *more)], capture_output=True, text=True, env={**ENV, "PYTHONPATH": "."})
    assert process.returncode == 0, process.stderr[-3000:]
    assert result_of(outs[1]) == result_of(outs[0])
    assert json.load(open(f"{outs[1]}/localized.json")) == localize.localize(localize.load(outs[0]), video)


if __name__ == "__main__":
    main(sys.argv[1:])
