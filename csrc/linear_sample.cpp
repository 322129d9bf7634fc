// torch.ops.socpo.linear_sample: LM head and draw, a tile of the vocabulary at a time, for all rows.
//
// A tile's logits stay in the cache and are never all stored, but for the rows whose draws are filtered. Every draw of a
// tile leaves a TileDraw; they are put together in the order of tiles, so threads change no bit.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "sample.h"

namespace socpo {
namespace {

constexpr int64_t ROWS_PER_BLOCK = 96;  // whose logits of a tile fit into L2

// The hidden rows that are drawn from, each once, side by side; and the draws sorted by row.
struct Draws {
  std::vector<int64_t> draw, row;  // draw[i] is from rows[row[i]]; row ascending
  at::Tensor hidden;

  Draws(const at::Tensor& from, const at::Tensor& rows) : draw(rows.numel()), row(rows.numel()) {
    const int64_t* rows_p = rows.const_data_ptr<int64_t>();
    for (size_t i = 0; i < draw.size(); ++i) draw[i] = i;
    std::stable_sort(draw.begin(), draw.end(), [&](int64_t a, int64_t b) { return rows_p[a] < rows_p[b]; });
    const int64_t width = from.size(1);
    hidden = at::empty({static_cast<int64_t>(draw.size()), width}, from.options());
    const float* from_p = from.const_data_ptr<float>();
    float* hidden_p = hidden.mutable_data_ptr<float>();
    int64_t num_rows = 0;
    for (size_t i = 0; i < draw.size(); ++i) {
      if (i == 0 || rows_p[draw[i]] != rows_p[draw[i - 1]])
        std::memcpy(hidden_p + num_rows++ * width, from_p + rows_p[draw[i]] * width, width * sizeof(float));
      row[i] = num_rows - 1;
    }
    hidden = hidden.narrow(0, 0, num_rows);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_sample(
    const at::Tensor& any_hidden, const at::Tensor& weight, const at::Tensor& row_keys, const at::Tensor& temperature,
    const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p, const at::Tensor& rows) {
  const Draws draws(any_hidden.contiguous(), rows.contiguous());
  const int64_t num_draws = draws.draw.size(), num_rows = draws.hidden.size(0), width = draws.hidden.size(1);
  const int64_t vocab = weight.size(0), num_tiles = (vocab + SAMPLE_TILE - 1) / SAMPLE_TILE;
  const DrawSettings settings(row_keys, temperature, top_k, top_p, min_p);
  std::vector<int64_t> kept_row(num_rows, -1);  // place in `kept` of the rows whose logits are needed whole
  int64_t num_kept = 0;
  for (int64_t i = 0; i < num_draws; ++i)
    if (settings.is_filtered(draws.draw[i]) && kept_row[draws.row[i]] < 0) kept_row[draws.row[i]] = num_kept++;
  at::Tensor kept = at::empty({num_kept, vocab}, draws.hidden.options());
  float* kept_p = kept.mutable_data_ptr<float>();
  const float* hidden_p = draws.hidden.const_data_ptr<float>();
  const char* weight_p = static_cast<const char*>(weight.const_data_ptr());

  std::vector<TileDraw> tiles(num_draws * num_tiles);
  std::vector<BestSoFar> best(at::get_num_threads() * num_draws);
  std::vector<std::vector<float>> buffers(at::get_num_threads());
  for_each_item_of_worker(num_tiles, [&](int64_t tile, int64_t worker) {
    const int64_t first = tile * SAMPLE_TILE, count = std::min<int64_t>(SAMPLE_TILE, vocab - first);
    std::vector<float>& logits = buffers[worker];
    logits.resize(std::min(num_rows, ROWS_PER_BLOCK) * SAMPLE_TILE);
    int64_t i = 0;
    for (int64_t row = 0; row < num_rows; row += ROWS_PER_BLOCK) {
      LinearBlock block{};
      block.x = hidden_p + row * width;
      block.x_stride = block.width = width;
      block.num_rows = std::min(ROWS_PER_BLOCK, num_rows - row);
      block.weight = weight_p + first * width * weight.element_size();
      block.is_bf16 = weight.scalar_type() == at::kBFloat16;
      block.num_outs = count;
      block.out = logits.data();
      block.out_stride = SAMPLE_TILE;
      kernels().linear_block(block);
      for (int64_t j = 0; j < block.num_rows; ++j)
        if (kept_row[row + j] >= 0)
          std::memcpy(kept_p + kept_row[row + j] * vocab + first, logits.data() + j * SAMPLE_TILE, count * sizeof(float));
      for (; i < num_draws && draws.row[i] < row + block.num_rows; ++i)
        tiles[i * num_tiles + tile] = kernels().sample_tile(settings.row(draws.draw[i]),
                                                            logits.data() + (draws.row[i] - row) * SAMPLE_TILE, first, count,
                                                            best[worker * num_draws + i]);
    }
  });

  at::Tensor token_ids = at::empty({num_draws}, row_keys.options());
  at::Tensor values = at::empty({3, num_draws}, draws.hidden.options());
  int64_t* token_ids_p = token_ids.mutable_data_ptr<int64_t>();
  float* values_p = values.mutable_data_ptr<float>();
  for_each_item(num_draws, [&](int64_t i) {
    const int64_t draw = draws.draw[i];
    Drawn drawn = merge_tiles(settings.row(draw), tiles.data() + i * num_tiles, num_tiles);
    if (settings.is_filtered(draw))
      drawn = draw_filtered(settings, draw, kept_p + kept_row[draws.row[i]] * vocab, vocab, drawn);
    token_ids_p[draw] = drawn.token_id;
    values_p[draw] = drawn.logprob;
    values_p[num_draws + draw] = drawn.entropy;
    values_p[2 * num_draws + draw] = drawn.kept_mass;
  });
  return {token_ids, values[0].clone(), values[1].clone(), values[2].clone()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_sample_meta(
    const at::Tensor& hidden, const at::Tensor&, const at::Tensor& row_keys, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, const at::Tensor&, const at::Tensor& rows) {
  const auto value = [&] { return at::empty_symint({rows.sym_size(0)}, hidden.options()); };
  return {at::empty_symint({rows.sym_size(0)}, row_keys.options()), value(), value(), value()};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("linear_sample", linear_sample); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("linear_sample", linear_sample_meta); }

}  // namespace socpo
