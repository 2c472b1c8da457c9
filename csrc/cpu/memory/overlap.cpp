#include "overlap.h"

#include <algorithm>
#include <cstdint>

#include "../lora/check.h"
#include "../lora/micro.h"
#include "../lora/torch.h"

namespace mbf::cpu {
namespace {

// From a tensor's first byte to its last; more than its own where it has gaps.
struct Span {
  uintptr_t begin, end;
  size_t n, partner;
  bool written;
  const Tensor* tensor;
};

void add_spans(const Partners& partners, bool written, std::vector<Span>& to) {
  for (size_t n = 0; n < partners.tensors.size(); ++n) {
    const Tensor& tensor = partners.tensors[n];
    int64_t reach = tensor.numel();
    if (reach == 0) continue;
    if (!tensor.is_contiguous()) {
      reach = 1;
      for (int64_t axis = 0; axis < tensor.dim(); ++axis) reach += (tensor.size(axis) - 1) * tensor.stride(axis);
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    to.push_back({begin, begin + reach * element_size(tensor.scalar_type()), n, partners.first + n, written, &tensor});
  }
}

bool lie_alike(const Tensor& one, const Tensor& other) {
  if (one.const_data_ptr() != other.const_data_ptr() || one.scalar_type() != other.scalar_type()) return false;
  if (!one.sizes().equals(other.sizes())) return false;
  return one.strides().equals(other.strides());
}

// The addresses of all elements.
std::vector<uintptr_t> addresses(const Tensor& tensor) {
  std::vector<uintptr_t> found{reinterpret_cast<uintptr_t>(tensor.const_data_ptr())};
  const int64_t size = element_size(tensor.scalar_type());
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    std::vector<uintptr_t> all;
    all.reserve(found.size() * tensor.size(axis));
    for (const uintptr_t address : found) {
      for (int64_t i = 0; i < tensor.size(axis); ++i) all.push_back(address + i * tensor.stride(axis) * size);
    }
    found = std::move(all);
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Whether both are columns of rows of one length, and have none in common.
bool beside(const Tensor& one, const Tensor& other) {
  if (one.dim() != 2 || other.dim() != 2 || one.stride(0) != other.stride(0)) return false;
  if (one.stride(1) != 1 || other.stride(1) != 1 || one.scalar_type() != other.scalar_type()) return false;
  const int64_t size = element_size(one.scalar_type()), row = one.stride(0) * size;
  const int64_t between =
      static_cast<const char*>(other.const_data_ptr()) - static_cast<const char*>(one.const_data_ptr());
  const int64_t place = row > 0 ? (between % row + row) % row : 0;  // of the other's first column in one's rows
  return one.size(1) * size <= place && place + other.size(1) * size <= row;
}

// Whether tensors whose spans overlap have a byte in common.
bool meet(const Tensor& one, const Tensor& other) {
  if (one.is_contiguous() && other.is_contiguous()) return true;
  if (beside(one, other)) return false;
  const auto left = addresses(one), right = addresses(other);
  const uintptr_t of_left = element_size(one.scalar_type()), of_right = element_size(other.scalar_type());
  for (size_t i = 0, j = 0; i < left.size() && j < right.size();) {
    if (left[i] + of_left <= right[j]) {
      ++i;
    } else if (right[j] + of_right <= left[i]) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

}  // namespace

void check_apart(const char* op, std::initializer_list<Partners> written, std::initializer_list<Partners> read) {
  std::vector<Span> spans;
  for (const Partners& partners : written) add_spans(partners, true, spans);
  for (const Partners& partners : read) add_spans(partners, false, spans);
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < spans.size(); ++i) {
    for (size_t j = i + 1; j < spans.size() && spans[j].begin < spans[i].end; ++j) {
      const Span &one = spans[i], &other = spans[j];
      if (!one.written && !other.written) continue;
      if (one.written != other.written && one.partner == other.partner && lie_alike(*one.tensor, *other.tensor))
        continue;
      if (!meet(*one.tensor, *other.tensor)) continue;
      const Span& first = one.written ? one : other;
      refuse({op, "written", static_cast<int64_t>(first.n)}, "shares memory with another argument; pass a clone of it");
    }
  }
}

}  // namespace mbf::cpu
