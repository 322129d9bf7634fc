"""Chooses the device and the number of threads, and copies tensors between host and device."""

import importlib.metadata
import os
import re
import warnings

import torch
from torch import Tensor

# Not empty in a process that was forked from one in which this module was imported.
_forks: list[int] = []
os.register_at_fork(after_in_child=lambda: _forks.append(os.getpid()))


TRITON = (
    (3, 6),
    (4,),
)  # the lowest supported version and the first unsupported, as in pyproject.toml
# Words in torch's message about a card that it cannot use -> advice to the user.
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
    """Returns the torch device of "cpu", "cuda" or "cuda:INDEX"; `where` names the setting.

    A card is tried, not only looked up.

    Raises:
        ValueError: the machine has no such device, or this process cannot use it. The reason may be
            torch, the driver, Triton, the card itself, or other processes on the card.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device
    try:
        torch.cuda.init()  # fails without a driver
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"{where}: {name} must be a device of this machine, which has "
                f"{torch.cuda.device_count()} "
                "CUDA devices; name one of them, or use cpu"
            )
        torch.cuda.mem_get_info(device)  # fails if no context can be made on the card
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
        (package.version for package in importlib.metadata.distributions(name="triton")), "none"
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
    """Sets the number of threads of CPU kernels; 0 leaves torch's choice.

    That is all cores, or OMP_NUM_THREADS.
    """
    # A fork copies the thread pool's data but not its threads. Kernels would wait for ever for
    # threads that do not exist, so a forked process uses one.
    if _forks and num_threads != 1:
        warnings.warn("run.threads is 1 in a forked process; spawn it to have more", stacklevel=2)
        num_threads = 1
    if num_threads:
        torch.set_num_threads(num_threads)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Returns x on a device; the host does not wait."""
    # Only a copy from pinned memory is asynchronous. From pageable memory the driver may copy
    # before it lets the host continue.
    needs_copy = x.is_cpu and device.type == "cuda"
    return (x.pin_memory() if needs_copy else x).to(device, non_blocking=True)


def upload_together(tensors: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Returns 1-D tensors of one dtype on a device, sent in one copy."""
    return upload(torch.cat(tensors), device).split([x.numel() for x in tensors])


class Readback:
    """A tensor on its way to the host, copied after all work already in the current stream.

    On a CPU it is the tensor itself, not a copy. Read it before writing to the tensor again.
    """

    def __init__(self, x: Tensor):
        self._host = x.to("cpu", non_blocking=True)  # from a card: into pinned memory
        self._copied: torch.cuda.Event | None = None
        if x.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(x.device))

    @property
    def is_ready(self) -> bool:
        """Whether wait() would return at once."""
        return self._copied is None or self._copied.query()

    def wait(self) -> Tensor:
        """Returns the tensor on the host; waits for this copy only, not for other streams."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def choose_vector_functions() -> None:
    """Makes MKL choose its functions behind torch's cos, exp, log, .. for this CPU, on one thread.

    MKL chooses at the first call in a process. If two threads make that call together, as they do
    for any larger tensor, one of them may compute its half with errors of 1e-4 (torch 2.13 on
    Intel: in half of all processes). The first step of a run would then not repeat bitwise.
    """
    # device: load_student makes models on the meta device, where nothing would be computed.
    torch.ones(1, device="cpu").cos()


def bound_kernel_caches() -> None:
    """Limits the two kernel caches of oneDNN to 128 shapes each, instead of 1024.

    This takes 60 MB instead of 600 MB and is not slower. The shapes of decoding come back before
    128 others have come; the shapes of packed rows hardly ever come back. Both caches read their
    size at the first matrix product of a process. A size that the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
