// empty_like_all: memory for the results of one call over many tensors, in one allocation a dtype where that is worth
// it. Every result is a tensor of its own to autograd: it has a part of the storage, but is nobody's view.

#include <algorithm>

#include "kernels.h"
#include "lora/check.h"
#include "lora/micro.h"
#include "lora/torch.h"
#include "memory/huge.h"

namespace mbf::cpu {
namespace {

// Bytes from which on the results are mostly memory not touched before, and the first touch of many small pages costs
// more than that of a few huge ones. Less is mostly found, piece by piece, in what was given back.
constexpr int64_t kWorth = int64_t{3} << 22;
constexpr int64_t kLine = 64;  // bytes of a cache line, on which every part begins

// The elements that a part takes.
int64_t room(const Tensor& tensor) {
  const int64_t line = kLine / element_size(tensor.scalar_type());
  return (tensor.numel() + line - 1) / line * line;
}

// Memory for the tensors of one type, and where the first of them begins; nothing where each has its own.
struct Memory {
  Tensor storage;
  int64_t next = 0;
};

std::optional<Memory> memory_for(const Tensors& like, ScalarType type) {
  int64_t elements = 0, count = 0;
  for (const Tensor& tensor : like) {
    if (tensor.scalar_type() != type) continue;
    elements += room(tensor);
    ++count;
  }
  const int64_t bytes = elements * element_size(type);
  if (count < 2 || bytes < kWorth) return std::nullopt;
  const Tensor storage = empty({elements + kHugePage / element_size(type)}, type);
  const char* data = static_cast<const char*>(storage.const_data_ptr());
  const char* begin = huge_page_from(data);
  ask_for_huge_pages(begin, begin + bytes);
  return Memory{storage, (begin - data) / element_size(type)};
}

}  // namespace

Tensors empty_like_all(Tensors like) {
  std::optional<Memory> memories[4];
  constexpr ScalarType kTypes[4] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};
  for (size_t n = 0; n < like.size(); ++n) check_float({"empty_like_all", "like", static_cast<int64_t>(n)}, like[n]);
  for (int t = 0; t < 4; ++t) memories[t] = memory_for(like, kTypes[t]);
  Tensors out;
  out.reserve(like.size());
  for (const Tensor& tensor : like) {
    const auto shape = shape_of(tensor);
    auto& memory = memories[std::find(kTypes, kTypes + 4, tensor.scalar_type()) - kTypes];
    if (memory.has_value()) {
      out.push_back(part_of(memory->storage, memory->next, shape));
      memory->next += room(tensor);
    } else {
      out.push_back(empty(shape, tensor.scalar_type()));
    }
  }
  return out;
}

}  // namespace mbf::cpu
