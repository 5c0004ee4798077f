// What a build without CUDA answers.
#include <stdexcept>

#include "kernels/backend.h"

namespace mixlora {

std::string cuda_unavailable_reason() {
  return "this build has no CUDA backend; configure with -DMIXLORA_CUDA=ON where nvcc is";
}
std::unique_ptr<Backend> make_cuda_backend(Precision /*precision*/, int /*device*/) {
  throw std::runtime_error("CUDA: " + cuda_unavailable_reason());
}

}  // namespace mixlora
