"""The machine: which device a run uses, and how many of its threads."""

import importlib.metadata
import os
import re
import warnings

import torch
from torch import Tensor

_forks: list[int] = []  # this process, where it is a fork of one that had torch
os.register_at_fork(after_in_child=lambda: _forks.append(os.getpid()))


TRITON = (3, 6), (4,)  # from, and below: as pyproject.toml says
# What torch says of a card that it cannot use -> what to do about it.
ADVICE = {
    "compiled with CUDA": "install a build of torch with CUDA",
    "driver": "install a driver that fits this torch, or a torch that fits the driver",
    "busy or unavailable": "it is in use by others, whom nvidia-smi names: wait for them, or name "
    "another card",
    "out of memory": "it is in use by others, whom nvidia-smi names: wait for them, or name "
    "another card",
    "": "nvidia-smi tells its state",
}


def select_device(name: str, where: str = "run.device") -> torch.device:
    """The torch device of "cpu", "cuda" or "cuda:INDEX", tried out where it is a card; `where` is
    the setting.

    Raises:
        ValueError: this machine has none such; or its torch, driver or Triton, the card itself, or
            others who use it, keep this process from it.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device
    try:
        torch.cuda.init()  # needs a driver
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"{where}: {name} must be a device of this machine, which has "
                f"{torch.cuda.device_count()} "
                "CUDA devices; name one of them, or use cpu"
            )
        torch.cuda.mem_get_info(device)  # needs a context on the card
    except (AssertionError, RuntimeError) as error:
        reason = re.split(r"\. |\n", str(error))[0]
        advice = next(advice for words, advice in ADVICE.items() if words in reason)
        raise ValueError(
            f"{where}: {name} must be a card that torch {torch.__version__} can use, got "
            f"{reason!r}; "
            f"{advice}, or use cpu"
        ) from None
    major, minor = torch.cuda.get_device_capability(device)
    triton = next(
        (found.version for found in importlib.metadata.distributions(name="triton")), "none"
    )
    is_known = TRITON[0] <= tuple(map(int, re.findall(r"\d+", triton)[:2])) < TRITON[1]
    rules = (
        (major >= 8, f"of compute capability 8.0 or newer, got {major}.{minor}; name a newer card"),
        (is_known, f"one beside Triton >=3.6,<4, got {triton}; pip install 'triton>=3.6,<4'"),
    )
    for holds, rule in rules:
        if not holds:
            raise ValueError(f"{where}: {name} must be {rule}, or use cpu")
    return device


def set_threads(num_threads: int) -> None:
    """Set the number of threads of CPU kernels; 0 = torch's choice (all cores, or OMP_NUM_THREADS).

    A fork has one: kernels would wait for their parent's others, which are not there.
    """
    if _forks and num_threads != 1:
        warnings.warn("run.threads is 1 in a forked process; spawn it to have more", stacklevel=2)
        num_threads = 1
    if num_threads:
        torch.set_num_threads(num_threads)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Returns x on a device; the host does not wait.

    Pinned first: out of memory that may be moved, a driver may copy before it lets the host go on.
    """
    is_moved = x.is_cpu and device.type == "cuda"
    return (x.pin_memory() if is_moved else x).to(device, non_blocking=True)


def upload_together(tensors: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Returns tensors [..] of one dtype on a device, all by one upload."""
    return upload(torch.cat(tensors), device).split([x.numel() for x in tensors])


class Readback:
    """A tensor on its way to the host, behind what the current stream was given before.

    On a CPU it is the tensor itself: whoever writes to it again has read it before.
    """

    def __init__(self, x: Tensor):
        self._host = x.to("cpu", non_blocking=True)  # pinned, where it was on a card
        self._copied: torch.cuda.Event | None = None
        if x.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(x.device))

    @property
    def is_ready(self) -> bool:
        """Whether wait would return at once."""
        return self._copied is None or self._copied.query()

    def wait(self) -> Tensor:
        """Returns the tensor on the host; waits for its stream alone, no other one."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def choose_vector_functions() -> None:
    """Have MKL choose the functions behind torch's cos, exp, log, .. for this CPU, from one thread.

    It chooses at a process's first call. Where two threads make that one together, as in any tensor
    of some size, one of them may compute its half with errors of 1e-4 (torch 2.13 on Intel: in half
    of all processes), and a run's first step has other bits than its repetition.
    """
    torch.ones(1).cos()


def bound_kernel_caches() -> None:
    """Let oneDNN, where it computes products, keep what it prepares for 128 shapes, not for 1024.

    That is 60 MB instead of 600 and not slower: shapes of decoding come again before so many others
    have come, those of packed rows hardly ever do. Both of its caches read their size at the first
    product of a process. A size that the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
