// What the operators need of torch: the C functions of its stable ABI (torch >= 2.10), and C++ around them.
//
// They are declared here rather than taken from torch's headers, so that a build needs a compiler and no torch: an isolated
// build of a source distribution has none. The names, types and the meaning of a StableIValue are torch's documented ABI
// (torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h); a test compiles both declarations side by side.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
class TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
struct StringOpaque;
using StringHandle = StringOpaque*;
using StableIValue = uint64_t;    // an argument or result of an operator: a number, a handle, or a pointer to one (optional)
using AOTITorchError = int32_t;   // 0: success
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* context);

extern "C" {
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*);
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle);
AOTITorchError torch_library_impl(TorchLibraryHandle, const char*, void (*)(StableIValue*, uint64_t, uint64_t), uint64_t);
AOTITorchError torch_call_dispatcher(const char*, const char*, StableIValue*, uint64_t);

AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle, AtenTensorHandle*);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, AtenTensorHandle*);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle, bool*);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle, void**);

AOTITorchError torch_new_list_reserve_size(size_t, StableListHandle*);
AOTITorchError torch_list_push_back(StableListHandle, StableIValue);
AOTITorchError torch_list_size(StableListHandle, size_t*);
AOTITorchError torch_list_get_item(StableListHandle, size_t, StableIValue*);
AOTITorchError torch_delete_list(StableListHandle);
AOTITorchError torch_new_string_handle(const char*, size_t, StringHandle*);
AOTITorchError torch_string_length(StringHandle, size_t*);
AOTITorchError torch_string_c_str(StringHandle, const char**);
AOTITorchError torch_delete_string(StringHandle);

AOTITorchError torch_parallel_for(int64_t, int64_t, int64_t, ParallelFunc, void*);
AOTITorchError torch_get_num_threads(uint32_t*);

#if defined(__ELF__)
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();  // from torch 2.13 on
#endif

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_memory_format_contiguous_format();
}

namespace littlebit {

constexpr uint64_t kTorch = uint64_t{2} << 56 | uint64_t{10} << 48;  // the version whose ABI this is written for

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check(bool right, const Parts&... parts) {
  if (!right) fail(parts...);
}

inline void call(AOTITorchError error) {
  if (!error) return;
#if defined(__ELF__)
  if (torch_exception_get_what_without_backtrace) fail(torch_exception_get_what_without_backtrace());
#endif
  fail("torch reported an error to the compiled CPU kernel; it is on the standard error stream");
}

template <class T, class F, class... Arguments>
T ask(F function, Arguments... arguments) {
  T value{};
  call(function(arguments..., &value));
  return value;
}

// A tensor that is owned.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  // Not zeroed, contiguous, and no view: autograd refuses to modify a view from inside an operator.
  static Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, const Tensor& like) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
    return Tensor(ask<AtenTensorHandle>(aoti_torch_empty_strided, static_cast<int64_t>(sizes.size()), sizes.data(),
                                        strides.data(), dtype, aoti_torch_device_type_cpu(),
                                        ask<int32_t>(aoti_torch_get_device_index, like.handle_)));
  }

  Tensor contiguous() const {
    StableIValue stack[2] = {reinterpret_cast<StableIValue>(ask<AtenTensorHandle>(aoti_torch_new_tensor_handle, handle_)),
                             static_cast<StableIValue>(aoti_torch_memory_format_contiguous_format())};
    call(torch_call_dispatcher("aten::contiguous", "", stack, kTorch));
    return Tensor(reinterpret_cast<AtenTensorHandle>(stack[0]));
  }

  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim, handle_); }
  int64_t size(int64_t i) const { return ask<int64_t*>(aoti_torch_get_sizes, handle_)[i]; }
  int64_t stride(int64_t i) const { return ask<int64_t*>(aoti_torch_get_strides, handle_)[i]; }
  std::vector<int64_t> sizes() const {
    const int64_t* first = ask<int64_t*>(aoti_torch_get_sizes, handle_);
    return std::vector<int64_t>(first, first + dim());
  }
  int32_t dtype() const { return ask<int32_t>(aoti_torch_get_dtype, handle_); }
  bool is_cpu() const { return ask<int32_t>(aoti_torch_get_device_type, handle_) == aoti_torch_device_type_cpu(); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous, handle_); }
  const void* data() const { return ask<const void*>(torch_get_const_data_ptr, handle_); }
  void* mutable_data() const { return ask<void*>(torch_get_mutable_data_ptr, handle_); }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_;
};

inline std::string dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float16(), "float16"}, {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float32(), "float32"}, {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_uint8(), "uint8"},     {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},     {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int64(), "int64"},     {aoti_torch_dtype_bool(), "bool"},
  };
  for (const auto& [known, name] : names) {
    if (known == dtype) return name;
  }
  return "of another dtype";
}

// An argument, from a StableIValue that the callee owns. Take<int32_t> is a dtype.
template <class T>
struct Take {
  static T from(StableIValue value) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(StableIValue));
    T result;
    std::memcpy(&result, &value, sizeof(T));  // the first bytes: every machine this is built for is little-endian
    return result;
  }
};

template <>
struct Take<Tensor> {
  static Tensor from(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
};

template <class T>
struct Take<std::optional<T>> {
  static std::optional<T> from(StableIValue value) {
    auto* held = reinterpret_cast<StableIValue*>(value);
    if (!held) return std::nullopt;
    std::optional<T> result(Take<T>::from(*held));
    delete held;
    return result;
  }
};

// A list that is owned.
class List {
 public:
  explicit List(StableListHandle handle) : handle_(handle) {}
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  ~List() {
    if (handle_) torch_delete_list(handle_);
  }

  size_t size() const { return ask<size_t>(torch_list_size, handle_); }
  StableIValue item(size_t i) const { return ask<StableIValue>(torch_list_get_item, handle_, i); }
  void append(StableIValue value) { call(torch_list_push_back(handle_, value)); }
  StableListHandle release() { return std::exchange(handle_, nullptr); }

 private:
  StableListHandle handle_;
};

template <class T>
struct Take<std::vector<T>> {
  static std::vector<T> from(StableIValue value) {
    const List list(reinterpret_cast<StableListHandle>(value));
    const size_t size = list.size();
    std::vector<T> result;
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) result.push_back(Take<T>::from(list.item(i)));
    return result;
  }
};

template <>
struct Take<std::string> {
  static std::string from(StableIValue value) {
    const auto handle = reinterpret_cast<StringHandle>(value);
    std::string text(ask<const char*>(torch_string_c_str, handle), ask<size_t>(torch_string_length, handle));
    call(torch_delete_string(handle));
    return text;
  }
};

// A result, which the caller owns.
inline StableIValue give(Tensor tensor) { return reinterpret_cast<StableIValue>(tensor.release()); }

inline StableIValue give(const std::string& text) {
  return reinterpret_cast<StableIValue>(ask<StringHandle>(torch_new_string_handle, text.data(), text.size()));
}

inline StableIValue give(std::vector<Tensor> tensors) {
  List list(ask<StableListHandle>(torch_new_list_reserve_size, tensors.size()));
  for (Tensor& tensor : tensors) list.append(give(std::move(tensor)));
  return reinterpret_cast<StableIValue>(list.release());
}

// Boxed<&f>::run: a function of C++ types as torch calls it.
template <auto function>
struct Boxed;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  using Values = std::tuple<std::remove_cv_t<std::remove_reference_t<Parameters>>...>;

  template <size_t... i>
  static Result run(const StableIValue* stack, std::index_sequence<i...>) {
    Values values{Take<std::tuple_element_t<i, Values>>::from(stack[i])...};
    return function(std::get<i>(std::move(values))...);
  }

  static void run(StableIValue* stack, uint64_t arguments, uint64_t) {
    check(arguments == sizeof...(Parameters), "an operator has ", arguments, " arguments, but takes ", sizeof...(Parameters));
    fill(stack, run(stack, std::index_sequence_for<Parameters...>{}));
  }

  template <class T>
  static void fill(StableIValue* stack, T&& result) {
    if constexpr (is_tuple<std::decay_t<T>>::value) {
      std::apply([&](auto&... each) { ((*stack++ = give(std::move(each))), ...); }, result);
    } else {
      *stack = give(std::move(result));
    }
  }

  template <class T>
  struct is_tuple : std::false_type {};
  template <class... T>
  struct is_tuple<std::tuple<T...>> : std::true_type {};
};

// Operators of a namespace: their schemas, or with a dispatch key their implementations. Lives as long as the library.
class Library {
 public:
  Library(const char* name, const char* key, void (*fill)(Library&)) {
    call(key ? aoti_torch_library_init_impl(name, key, "littlebit_cpu", 0, &handle_)
             : aoti_torch_library_init_fragment(name, "littlebit_cpu", 0, &handle_));
    fill(*this);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  ~Library() { aoti_torch_delete_library_object(handle_); }

  void define(const char* schema) { call(aoti_torch_library_def(handle_, schema)); }

  template <auto function>
  void implement(const char* name) {
    call(torch_library_impl(handle_, name, &Boxed<function>::run, kTorch));
  }

 private:
  TorchLibraryHandle handle_ = nullptr;
};

}  // namespace littlebit
