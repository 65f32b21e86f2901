// What the launchers ask a GPU for, its processors and its capability, asked once.
#include <map>
#include <mutex>

#include "runtime.h"

namespace fastpeft::cuda {

#ifdef FASTPEFT_EMULATE
Device device_of(int) { return {}; }
#else
Device device_of(int device) {
    static std::mutex mutex;
    static std::map<int, Device> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    Device facts;
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&facts.processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        cudaGetLastError();
        return {};  // the launch that asks will say what is wrong with the GPU
    }
    facts.capability = 10 * major + minor;
    return known[device] = facts;
}
#endif

}  // namespace fastpeft::cuda
