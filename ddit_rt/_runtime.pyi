from typing import TypedDict

__version__: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cuda: bool
    cuda_version: str
    cuda_architectures: str

class CudaStatus(TypedDict):
    available: bool
    device_count: int
    driver_version: int
    runtime_version: int
    reason: str

def build_info() -> BuildInfo: ...
def cuda_status() -> CudaStatus: ...
def reason_codes() -> dict[str, int]: ...
def cache_reason_codes() -> dict[str, int]: ...
