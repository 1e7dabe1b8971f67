from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

# What no device changes: the build, the CPU's own parts, programs that are run whole.
ON_THE_CPU = {
    f"test_{name}.py"
    for name in (
        "build compare cuda_build cuda_on_cpu gpu_script kept_memory levels main threads train_digits vector_math "
        "yolo_head"
    ).split()
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests make their tensors: cpu, cuda, cuda:1, or emulated (the CUDA kernels on the CPU)",
    )
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="compile the CUDA kernels for all that setup.py names",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_level: test_levels.py runs it at every CPU instruction set")
    config.addinivalue_line(
        "markers",
        "raises_on_the_cpu: on CUDA it is a device-side assertion, which the process does not outlive",
    )
    # The suite runs one process a core; more threads in each only get in the others' way.
    torch.set_num_threads(1)
    device = config.getoption("--device")
    if device.startswith("cuda"):
        from fused_losses import _ops

        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device {device}: PyTorch {torch.__version__} sees no CUDA device")
        if not _ops.CUDA:
            raise pytest.UsageError(f"--device {device}: fused_losses is built without CUDA")
        torch.set_default_device(device)
    elif device not in ("cpu", "emulated"):
        raise pytest.UsageError(f"--device is cpu, cuda, cuda:N or emulated, not {device!r}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--device") != "cpu" and collection_path.name in ON_THE_CPU else None


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """What --device says."""
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True, scope="session")
def _kernels(device: str) -> Iterator[None]:
    if device == "emulated":
        from cuda_on_cpu import build
        from cuda_on_cpu.emulated import emulated

        context = emulated(build.library(build.FOLDER))
    else:
        context = nullcontext()
    with context:
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(autouse=True)
def _device_still_works(request: pytest.FixtureRequest, device: str) -> Iterator[None]:
    if device != "cpu" and request.node.get_closest_marker("raises_on_the_cpu"):
        pytest.skip("a device-side assertion there: test_cuda.py")
    yield
    if device.startswith("cuda"):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # every later test would fail for it
            pytest.exit(f"{request.node.nodeid} has broken the CUDA context: {error}", returncode=1)


def pytest_make_parametrize_id(val: object) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype | tuple) else None
