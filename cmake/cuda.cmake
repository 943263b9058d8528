# Decides whether the CUDA kernels are built, and for which GPUs. Sets DDIT_RT_WITH_CUDA and
# DDIT_RT_ARCHITECTURES, and defines ddit_rt_cuda_module().
set(DDIT_RT_WITH_CUDA OFF)
set(DDIT_RT_ARCHITECTURES "")
if(NOT DDIT_RT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DDIT_RT_CUDA is '${DDIT_RT_CUDA}', expected AUTO, ON or OFF")
endif()

if(NOT DDIT_RT_CUDA STREQUAL "OFF")
  # nvcc is often installed but not on the search path.
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(DDIT_RT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
      PATH_SUFFIXES bin)
    if(DDIT_RT_NVCC)
      set(CMAKE_CUDA_COMPILER "${DDIT_RT_NVCC}")
    endif()
  endif()
  # Set before the language is enabled, which would otherwise choose an architecture by itself.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(DDIT_RT_DEFAULT_ARCHITECTURES ON)
    set(CMAKE_CUDA_ARCHITECTURES 80)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(DDIT_RT_WITH_CUDA ON)
  endif()
endif()

if(DDIT_RT_WITH_CUDA)
  if(DDIT_RT_DEFAULT_ARCHITECTURES)
    # A100, H100/H200; B200 and RTX 50 since CUDA 12.8; and PTX, so that newer GPUs run it too.
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
    else()
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120)
    endif()
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " DDIT_RT_ARCHITECTURES)
  message(STATUS
    "ddit_rt: CUDA kernels ON, nvcc ${CMAKE_CUDA_COMPILER_VERSION}, for ${DDIT_RT_ARCHITECTURES}")
elseif(DDIT_RT_CUDA STREQUAL "ON")
  message(FATAL_ERROR
    "DDIT_RT_CUDA=ON but no CUDA compiler was found. Put nvcc on PATH or set CUDACXX to it, or "
    "build with DDIT_RT_CUDA=OFF.")
elseif(DDIT_RT_CUDA STREQUAL "OFF")
  message(STATUS "ddit_rt: CUDA kernels OFF, as asked by DDIT_RT_CUDA=OFF")
else()
  message(WARNING
    "ddit_rt: no nvcc found, so this build has CPU kernels only and will not run on a GPU. Put "
    "nvcc on PATH or set CUDACXX to it, and build again.")
endif()

# Static CUDA runtime, and libtorch_cuda.so as a dependency even where torch is a CPU build: a
# one-function stub stands in for it while linking.
function(ddit_rt_cuda_module name)
  if(NOT TARGET ddit_rt_torch_cuda_stub)
    add_library(ddit_rt_torch_cuda_stub SHARED csrc/cuda/torch_cuda_stub.cpp)
    set_target_properties(ddit_rt_torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda)
  endif()
  set_target_properties(${name} PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_SEPARABLE_COMPILATION OFF)
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>)
  target_link_libraries(${name} PRIVATE ddit_rt_torch_cuda_stub CUDA::cudart_static)
endfunction()
