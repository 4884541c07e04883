// A CUDA driver without a device: every function tells a listener what it was given.
#include "cuda.h"
#include <stdint.h>

typedef CUresult (*Listener)(const char *function, const uint64_t *arguments);
static Listener listener;

void listen(Listener one) { listener = one; }

#define TELL(...)                                                                                                              \
  do {                                                                                                                         \
    const uint64_t arguments[] = {__VA_ARGS__};                                                                                \
    return listener ? listener(__func__, arguments) : CUDA_ERROR_NOT_INITIALIZED;                                              \
  } while (0)
#define AT(pointer) (uint64_t)(uintptr_t)(pointer)

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "refused by the stub";
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { TELL(AT(version)); }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { TELL(AT(device), ordinal); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  TELL(AT(value), attribute, device);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { TELL(AT(context), device); }
CUresult cuCtxGetCurrent(CUcontext *context) { TELL(AT(context)); }
CUresult cuCtxSetCurrent(CUcontext context) { TELL(AT(context)); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { TELL(AT(value), limit); }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { TELL(limit, value); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { TELL(AT(module), AT(image)); }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  TELL(AT(function), AT(module), AT(name));
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  TELL(AT(value), attribute, AT(function));
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  TELL(AT(function), attribute, value);
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { TELL(AT(function), config); }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  TELL(AT(value), attribute, pointer);
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  TELL(AT(clusters), AT(function), AT(config));
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  TELL(AT(map), type, rank, AT(address), AT(sizes), AT(strides), AT(box), AT(steps), interleave, swizzle, promotion, fill);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  TELL(AT(function), AT(parameters), AT(extra), c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
       c->blockDimZ, c->sharedMemBytes, AT(c->hStream), c->numAttrs);
}
