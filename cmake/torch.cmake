# Finds the torch of the Python that the package is built for, and defines ddit_rt_torch_module().
#
# Not by find_package(Torch): its configuration insists on the CUDA toolkit that torch was built with.
# Not from a build requirement either: an isolated build would then download a CUDA build of torch,
# several GB. `-I` makes Python ignore the build environment and look at its own packages.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

execute_process(
  COMMAND "${Python_EXECUTABLE}" -I -c "import importlib.util as u, os
spec = u.find_spec('torch')
print(os.path.dirname(spec.origin) if spec and spec.origin else '', end='')"
  OUTPUT_VARIABLE DDIT_RT_TORCH_DIR
  COMMAND_ERROR_IS_FATAL ANY)
if(NOT DDIT_RT_TORCH_DIR)
  message(FATAL_ERROR
    "ddit_rt needs PyTorch 2.11 or newer to be installed before it is built, and "
    "${Python_EXECUTABLE} has none. Run scripts/setup.sh, or: pip install torch==2.13.0")
endif()
if(NOT EXISTS "${DDIT_RT_TORCH_DIR}/include/torch/csrc/stable/c/shim.h")
  message(FATAL_ERROR
    "The torch in ${DDIT_RT_TORCH_DIR} has no stable C++ interface of version 2.10. "
    "Install torch 2.11 or newer.")
endif()
message(STATUS "ddit_rt: torch from ${DDIT_RT_TORCH_DIR}")

# A module that torch loads: no prefix, no Python in it, one binary for every torch >= 2.10.
function(ddit_rt_torch_module name)
  target_include_directories(${name} PRIVATE csrc csrc/include)
  target_include_directories(${name} SYSTEM PRIVATE "${DDIT_RT_TORCH_DIR}/include")
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
  target_link_libraries(${name} PRIVATE "${DDIT_RT_TORCH_DIR}/lib/libtorch_cpu.so")
  # Whoever loads the module has imported torch, so its libraries are found without a path.
  set_target_properties(${name} PROPERTIES PREFIX "" SKIP_BUILD_RPATH ON)
endfunction()
