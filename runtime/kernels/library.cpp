// What ONNX Runtime calls: the operators of the domain `onnxsmith`.
#include <exception>
#include <memory>

#include "attention.h"
#include "gather.h"
#include "heads.h"
#include "matmul.h"

namespace onnxsmith {

namespace {

constexpr int kInvalidArgument = 2;  // OrtErrorCode
constexpr int kFailure = 1;

// An operator's signature: the type of each input, how many of them a node must have, and its outputs.
struct Signature {
  const char* name;
  std::vector<ElementType> inputs;
  std::vector<bool> optional;
  std::vector<ElementType> outputs;
};

struct Made {
  Ort ort;
  std::vector<Input> inputs;
  std::unique_ptr<Kernel> kernel;
};

template <typename Work>
OrtStatus* guarded(Ort ort, const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return ort.create_status(kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return ort.create_status(kFailure, error.what());
  }
}

struct Operator : OrtCustomOp {
  Signature signature;

  explicit Operator(Signature of) : OrtCustomOp{}, signature(std::move(of)) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).name; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).inputs.size(); };
    GetInputType = [](const OrtCustomOp* op, size_t i) { return self(op).inputs[i]; };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).outputs.size(); };
    GetOutputType = [](const OrtCustomOp* op, size_t i) { return self(op).outputs[i]; };
    GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) {
      return self(op).optional[i] ? kOptional : kRequired;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    KernelDestroy = [](void* made) { delete static_cast<Made*>(made); };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
      const Made& made = *static_cast<Made*>(kernel);
      return guarded(made.ort, [&] { made.kernel->compute(Run(made.ort, context, made.inputs)); });
    };
  }

  static const Signature& self(const OrtCustomOp* op) { return static_cast<const Operator*>(op)->signature; }
};

template <typename K>
struct OperatorOf : Operator {
  explicit OperatorOf(Signature of) : Operator(std::move(of)) {
    CreateKernelV2 = [](const OrtCustomOp*, OrtApi api, const OrtKernelInfo* info, void** out) -> OrtStatus* {
      const Ort ort(api);
      return guarded(ort, [&] {
        const Node node(ort, info);
        *out = new Made{ort, node.inputs(), std::make_unique<K>(node)};
      });
    };
  }
};

const Operator* const* operators(size_t* count) {
  static const OperatorOf<MatMulPacked> matmul({"MatMulPacked",
                                                {kFloat, kUndefined, kUndefined, kUndefined, kFloat, kFloat},
                                                {false, false, true, true, true, true},
                                                {kFloat}});
  static const OperatorOf<NormMatMulPacked> norm_matmul(
      {"NormMatMulPacked",
       {kFloat, kFloat, kFloat, kUndefined, kUndefined, kUndefined, kFloat},
       {false, true, false, false, true, true, true},
       {kFloat, kFloat}});
  static const OperatorOf<GatherPacked> gather({"GatherPacked",
                                                {kInt64, kUint8, kUndefined, kUndefined},
                                                {false, false, false, true},
                                                {kFloat}});
  // query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache,
  // position_ids, attention_bias, head_sink
  static const OperatorOf<GroupQueryAttention> attention(
      {"GroupQueryAttention",
       {kFloat, kFloat, kFloat, kFloat, kFloat, kInt32, kInt32, kFloat, kFloat, kInt64, kFloat, kFloat},
       {false, true, true, false, false, false, false, true, true, true, true, true},
       {kFloat, kFloat, kFloat}});
  // query, key, value, bias, attention_bias
  static const OperatorOf<MultiHeadAttention> heads({"MultiHeadAttention",
                                                     {kFloat, kFloat, kFloat, kFloat, kFloat},
                                                     {false, true, true, true, true},
                                                     {kFloat}});
  static const Operator* const all[] = {&matmul, &norm_matmul, &gather, &attention, &heads};
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

}  // namespace

}  // namespace onnxsmith

#define ONNXSMITH_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set that was chosen, for `onnxsmith kernels`.
ONNXSMITH_EXPORT const char* onnxsmith_kernels_isa() { return onnxsmith::tiles().name; }

// The name of an operator, for the same; null behind the last one.
ONNXSMITH_EXPORT const char* onnxsmith_kernels_operator(size_t index) {
  size_t count = 0;
  const onnxsmith::Operator* const* all = onnxsmith::operators(&count);
  return index < count ? all[index]->signature.name : nullptr;
}

ONNXSMITH_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    // The functions that are needed to say so are as old as the interface.
    const OrtApi oldest = base->GetApi(1);
    return oldest == nullptr
               ? nullptr
               : Ort(oldest).create_status(onnxsmith::kFailure, "onnxsmith: its kernels need ONNX Runtime 1.17");
  }
  const Ort ort(table);
  // One domain for the life of the process: sessions refer to it and do not own it.
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* failed = [&]() -> OrtStatus* {
    if (OrtStatus* status = ort.create_domain("onnxsmith", &domain)) return status;
    size_t count = 0;
    const onnxsmith::Operator* const* all = onnxsmith::operators(&count);
    for (size_t i = 0; i < count; ++i) {
      if (OrtStatus* status = ort.add_operator(domain, all[i])) return status;
    }
    return nullptr;
  }();
  if (failed != nullptr) return ort.create_status(onnxsmith::kFailure, "onnxsmith: its operators were refused");
  return ort.add_domain(options, domain);
}
