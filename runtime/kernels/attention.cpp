#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attend.h"

namespace onnxsmith {

namespace {

constexpr const char* kName = "GroupQueryAttention";
constexpr int64_t kRowsOfTask = 16;  // of a long prompt
constexpr int64_t kFew = 64;         // query rows of one key head that share a pass over the keys
constexpr int64_t kMost = 1 << 20;   // heads: what is computed from their number stays far from overflow

struct Queries;
struct Parts;

// Rotates `row` [size] into `out` by a cosine and a sine for each pair of its first numbers.
void rotate(const float* row, const float* cosine, const float* sine, int64_t pairs, int64_t size,
            bool interleaved, float* out) {
  if (interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      out[2 * i] = row[2 * i] * cosine[i] - row[2 * i + 1] * sine[i];
      out[2 * i + 1] = row[2 * i + 1] * cosine[i] + row[2 * i] * sine[i];
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = row[i];
      const float b = row[i + pairs];
      out[i] = a * cosine[i] - b * sine[i];
      out[i + pairs] = b * cosine[i] + a * sine[i];
    }
  }
  for (int64_t i = 2 * pairs; i < size; ++i) out[i] = row[i];
}

// Shapes and operands of one run, checked.
struct Call {
  Tensor query, key, value, past_key, past_value, cosine, sine, positions, bias, sinks;
  int64_t batch, rows, heads, kv_heads, size, past, total;
  const float* row(const Tensor& of, int64_t b, int64_t s, int64_t at) const {
    return of.as<float>() + (b * rows + s) * of.shape[2] + at;
  }
};

Call read(const Run& run, int64_t heads, int64_t kv_heads, bool rotary, bool rotary_rows) {
  Call call;
  call.heads = heads;
  call.kv_heads = kv_heads;
  call.query = run.input(0);
  call.key = run.input(1);
  call.value = run.input(2);
  call.past_key = run.input(3);
  call.past_value = run.input(4);
  const Tensor total = run.input(6);
  call.cosine = run.input(7);
  call.sine = run.input(8);
  call.positions = run.input(9);
  call.bias = run.input(10);
  call.sinks = run.input(11);
  const Shape& shape = call.query.shape;
  if (shape.size() != 3) {
    fail(kName, "query", text(shape), "[batch, sequence, width]");
  }
  call.batch = shape[0];
  call.rows = shape[1];
  const bool packed = !call.key;
  if (packed != !call.value) {
    fail(kName, "key and value", "one of them", "both or none");
  }
  const int64_t parts = packed ? heads + 2 * kv_heads : heads;
  if (shape[2] <= 0 || shape[2] % (16 * parts) != 0) {
    fail(kName, "query", text(shape), "a width of " + std::to_string(parts) + " heads, each a multiple of 16");
  }
  call.size = shape[2] / parts;
  if (!packed) {
    const Shape wanted{call.batch, call.rows, kv_heads * call.size};
    if (call.key.shape != wanted) {
      fail(kName, "key", text(call.key.shape), text(wanted));
    }
    if (call.value.shape != wanted) {
      fail(kName, "value", text(call.value.shape), text(wanted));
    }
  }
  const Shape& past = call.past_key.shape;
  if (past.size() != 4 || past[0] != call.batch || past[1] != kv_heads || past[3] != call.size) {
    fail(kName, "past_key", text(past), "[batch, kv_num_heads, past, head size]");
  }
  if (call.past_value.shape != past) {
    fail(kName, "past_value", text(call.past_value.shape), text(past));
  }
  call.past = past[2];
  if (total.type != kInt32 || total.size() != 1) {
    fail(kName, "total_sequence_length", text(total.shape), "one int32");
  }
  call.total = total.as<int32_t>()[0];
  if (call.total < call.rows || call.total - call.rows > call.past) {
    fail(kName, "total_sequence_length", std::to_string(call.total),
         "at least " + std::to_string(call.rows) + " and at most " + std::to_string(call.rows + call.past));
  }
  if (rotary) {
    if (!call.cosine || !call.sine || call.cosine.shape.size() != 2 || call.cosine.shape != call.sine.shape ||
        2 * call.cosine.shape[1] > call.size) {
      fail(kName, "cos_cache", text(call.cosine.shape), "[positions, at most half a head], as sin_cache");
    }
    if (rotary_rows && call.cosine.shape[0] != call.batch * call.rows) {
      fail(kName, "cos_cache", text(call.cosine.shape),
           "a row for each of " + std::to_string(call.batch * call.rows) + " queries");
    }
    if (call.positions && call.positions.size() != call.batch * call.rows) {
      fail(kName, "position_ids", text(call.positions.shape), text({call.batch, call.rows}));
    }
  }
  if (call.bias) {
    const Shape& bias = call.bias.shape;
    if (bias.size() != 4 || (bias[0] != 1 && bias[0] != call.batch) || (bias[1] != 1 && bias[1] != heads) ||
        bias[2] != call.rows || bias[3] < call.total) {
      fail(kName, "attention_bias", text(bias), "[1 or batch, 1 or num_heads, sequence, total]");
    }
  }
  if (call.sinks && call.sinks.size() != heads) {
    fail(kName, "head_sink", text(call.sinks.shape), "one for each head");
  }
  return call;
}

}  // namespace

GroupQueryAttention::GroupQueryAttention(const Node& node)
    : heads_(node.integer("num_heads")),
      kv_heads_(node.integer("kv_num_heads")),
      scale_(node.number("scale", 0.0f)),
      softcap_(node.number("softcap", 0.0f)),
      window_(node.integer("local_window_size", -1)),
      rotary_(node.integer("do_rotary", 0) != 0),
      interleaved_(node.integer("rotary_interleaved", 0) != 0),
      rotary_rows_(node.integer("rotary_rows", 0) != 0) {
  if (heads_ <= 0 || heads_ > kMost || kv_heads_ <= 0 || heads_ % kv_heads_ != 0) {
    fail(kName, "num_heads", std::to_string(heads_),
         "at most 2^20, and a multiple of kv_num_heads = " + std::to_string(kv_heads_));
  }
}

void GroupQueryAttention::compute(const Run& run) const {
  const Call call = read(run, heads_, kv_heads_, rotary_, rotary_rows_);
  const int64_t size = call.size;
  const int64_t rows = call.rows;
  const int64_t group = heads_ / kv_heads_;
  const int64_t before = call.total - rows;
  const int64_t capacity = std::max(call.past, call.total);
  const Tensor y = run.output(0, {call.batch, rows, heads_ * size}, kFloat);
  const Shape cache{call.batch, kv_heads_, capacity, size};
  const Tensor keys = run.output(1, cache, kFloat);
  const Tensor values = run.output(2, cache, kFloat);
  if (call.batch == 0) return;

  float* queries = reinterpret_cast<float*>(
      scratch<Queries>(sizeof(float) * call.batch * heads_ * rows * size));  // [batch, heads, rows, size]
  const float scale = scale_ != 0.0f ? scale_ : 1.0f / std::sqrt(static_cast<float>(size));
  const bool packed = !call.key;
  const int64_t pairs = rotary_ ? call.cosine.shape[1] : 0;

  // Rotates what is new, and puts it where it is read: one key head with its queries.
  const auto prepare = [&](size_t task) {
    const int64_t b = task / kv_heads_;
    const int64_t h = task % kv_heads_;
    float* key_rows = keys.as<float>() + task * capacity * size;
    float* value_rows = values.as<float>() + task * capacity * size;
    const float* past_keys = call.past_key.as<float>() + task * call.past * size;
    const float* past_values = call.past_value.as<float>() + task * call.past * size;
    // Past and present may be one buffer. Of another one, nothing is left as it was found.
    const auto keep = [&](const float* from, float* to) {
      if (from == to) return;
      std::copy(from, from + before * size, to);
      std::fill(to + call.total * size, to + capacity * size, 0.0f);
    };
    keep(past_keys, key_rows);
    keep(past_values, value_rows);
    for (int64_t s = 0; s < rows; ++s) {
      const float* cosine = nullptr;
      const float* sine = nullptr;
      if (rotary_) {
        int64_t position = before + s;
        if (rotary_rows_) {
          position = b * rows + s;
        } else if (call.positions) {
          position = call.positions.as<int64_t>()[b * rows + s];
        }
        if (position < 0 || position >= call.cosine.shape[0]) {
          fail(std::string(kName) + ", position_ids", std::to_string(position),
               "one of the " + std::to_string(call.cosine.shape[0]) + " rows of cos_cache");
        }
        cosine = call.cosine.as<float>() + position * pairs;
        sine = call.sine.as<float>() + position * pairs;
      }
      const float* key = packed ? call.row(call.query, b, s, (heads_ + h) * size) : call.row(call.key, b, s, h * size);
      const float* value = packed ? call.row(call.query, b, s, (heads_ + kv_heads_ + h) * size)
                                  : call.row(call.value, b, s, h * size);
      rotate(key, cosine, sine, pairs, size, interleaved_, key_rows + (before + s) * size);
      std::memcpy(value_rows + (before + s) * size, value, sizeof(float) * size);
      for (int64_t g = h * group; g < (h + 1) * group; ++g) {
        float* out = queries + ((b * heads_ + g) * rows + s) * size;
        rotate(call.row(call.query, b, s, g * size), cosine, sine, pairs, size, interleaved_, out);
        for (int64_t d = 0; d < size; ++d) out[d] *= scale;
      }
    }
  };
  const int64_t key_heads = call.batch * kv_heads_;
  if (rows == 1 && keys.data == call.past_key.data) {
    for (int64_t task = 0; task < key_heads; ++task) prepare(task);
  } else {
    run.parallel(key_heads, prepare);
  }
  if (rows == 0) return;

  const auto query_row = [&](int64_t b, int64_t h, int64_t s) {
    QueryRow row;
    row.query = queries + ((b * heads_ + h) * rows + s) * size;
    row.bias = nullptr;
    if (call.bias) {
      const Shape& shape = call.bias.shape;
      const int64_t batch = shape[0] == 1 ? 0 : b;
      const int64_t head = shape[1] == 1 ? 0 : h;
      row.bias = call.bias.as<float>() + ((batch * shape[1] + head) * shape[2] + s) * shape[3];
    }
    row.end = before + s + 1;
    row.first = window_ > 0 ? std::max<int64_t>(0, row.end - window_) : 0;
    return row;
  };
  const auto finish = [&](int64_t b, int64_t h, int64_t s, const Partial& partial, const float* sums) {
    float total = partial.sum;
    float factor = 1.0f;
    if (call.sinks) {
      // One more key of this score and no value.
      const float sink = call.sinks.as<float>()[h];
      const float highest = std::max(sink, partial.highest);
      factor = std::exp(partial.highest - highest);
      total = total * factor + std::exp(sink - highest);
    }
    const float inverse = total > 0.0f ? factor / total : 0.0f;
    float* out = y.as<float>() + ((b * rows + s) * heads_ + h) * size;
    for (int64_t d = 0; d < size; ++d) out[d] = sums[d] * inverse;
  };
  const Attend& isa = attend();

  // A few rows: threads share the keys. All queries of a key head go over a piece of its keys together.
  const int64_t together = group * rows;
  const int64_t pieces = (call.total + kPiece - 1) / kPiece;
  if (together <= kFew) {
    const int64_t first = window_ > 0 ? std::max<int64_t>(0, before + 1 - window_) / kPiece : 0;
    const int64_t width = together * (size + 2);
    float* parts = reinterpret_cast<float*>(scratch<Parts>(sizeof(float) * key_heads * pieces * width));
    run.parallel(key_heads * (pieces - first), [&](size_t task) {
      const int64_t head = task / (pieces - first);
      const int64_t piece = first + task % (pieces - first);
      const int64_t b = head / kv_heads_;
      QueryRow some[kFew];
      for (int64_t i = 0; i < together; ++i) some[i] = query_row(b, head % kv_heads_ * group + i % group, i / group);
      float* part = parts + (head * pieces + piece) * width;
      isa.far_piece(some, together, keys.as<float>() + head * capacity * size,
                    values.as<float>() + head * capacity * size, size, piece * kPiece, call.total, softcap_,
                    reinterpret_cast<Partial*>(part), part + 2 * together);
    });
    for (int64_t head = 0; head < key_heads; ++head) {
      for (int64_t i = 0; i < together; ++i) {
        Partial sum{0.0f, 0.0f};
        float* sums = parts + (head * pieces + first) * width + 2 * together + i * size;
        for (int64_t piece = first; piece < pieces; ++piece) {
          const float* part = parts + (head * pieces + piece) * width;
          isa.merge(&sum, sums, reinterpret_cast<const Partial*>(part)[i], part + 2 * together + i * size, size);
        }
        finish(head / kv_heads_, head % kv_heads_ * group + i % group, i / group, sum, sums);
      }
    }
    return;
  }

  // A prompt: threads share heads and rows, the longest first.
  const int64_t blocks = (rows + kRowsOfTask - 1) / kRowsOfTask;
  run.parallel(call.batch * heads_ * blocks, [&](size_t task) {
    const int64_t block = blocks - 1 - task / (call.batch * heads_);
    const int64_t b = task % (call.batch * heads_) / heads_;
    const int64_t h = task % heads_;
    const int64_t head = b * kv_heads_ + h / group;
    const int64_t from = block * kRowsOfTask;
    const int64_t count = std::min(kRowsOfTask, rows - from);
    QueryRow some[kRowsOfTask];
    Partial sum[kRowsOfTask];
    Partial part[kRowsOfTask];
    for (int64_t i = 0; i < count; ++i) {
      some[i] = query_row(b, h, from + i);
      sum[i] = {0.0f, 0.0f};
    }
    struct Sums;
    float* sums = reinterpret_cast<float*>(scratch<Sums>(sizeof(float) * 2 * kRowsOfTask * size));
    float* more = sums + kRowsOfTask * size;
    const int64_t end = some[count - 1].end;
    for (int64_t begin = some[0].first / kPiece * kPiece; begin < end; begin += kPiece) {
      isa.piece(some, count, keys.as<float>() + head * capacity * size,
                values.as<float>() + head * capacity * size, size, begin, end, softcap_, part, more);
      for (int64_t i = 0; i < count; ++i) isa.merge(&sum[i], sums + i * size, part[i], more + i * size, size);
    }
    for (int64_t i = 0; i < count; ++i) finish(b, h, from + i, sum[i], sums + i * size);
  });
}

}  // namespace onnxsmith
