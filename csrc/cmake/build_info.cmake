# Writes build_info.json. `python -m sts_kernels info` and setup.py print it.
file(STRINGS ${TORCH_INCLUDE}/torch/headeronly/version.h parts REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
list(TRANSFORM parts REPLACE "^.* " "")
list(JOIN parts . torch_headers)
set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")

set(commit "")
if(EXISTS ${CMAKE_SOURCE_DIR}/.git)
  execute_process(COMMAND git -C ${CMAKE_SOURCE_DIR} describe --always --dirty --abbrev=12 --exclude=*
                  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()

if(CUDA_VERSION)
  list(JOIN CUDA_CODE ", " summary)
  set(summary "CPU and CUDA kernels (CUDA ${CUDA_VERSION}: ${summary})")
  list(JOIN CUDA_CODE "\", \"" architectures)
  set(architectures "\"${architectures}\"")
else()
  set(summary "CPU kernels only (no CUDA kernels: ${CUDA_REASON})")
  set(architectures "")
endif()
string(APPEND summary ", ${compiler}, torch ${torch_headers} headers, for torch ${TORCH_FLOOR} and newer")

file(CONFIGURE OUTPUT build_info.json @ONLY CONTENT [[{
  "version": "@version@",
  "commit": "@commit@",
  "summary": "@summary@",
  "library": true,
  "namespace": "@STS_NAMESPACE@",
  "reason": "@CUDA_REASON@",
  "torch": "@torch_headers@",
  "torch_target": "@TORCH_FLOOR@",
  "cuda": "@CUDA_VERSION@",
  "architectures": [@architectures@],
  "compiler": "@compiler@",
  "system": "@CMAKE_SYSTEM_NAME@ @CMAKE_SYSTEM_PROCESSOR@"
}
]])
message(STATUS "sts_kernels ${version}: ${summary}")
