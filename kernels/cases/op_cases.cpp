#include "kernels/cases/op_cases.h"

namespace mixlora::cases {

std::string times(std::initializer_list<std::int64_t> extents) {
  std::string text;
  for (const auto n : extents) {
    if (!text.empty()) text += 'x';
    text += std::to_string(n);
  }
  return text;
}

std::vector<OpCase> op_cases() {
  std::vector<OpCase> table;
  add_product_cases(table);
  add_row_cases(table);
  add_low_rank_cases(table);
  add_attention_cases(table);
  add_router_cases(table);
  add_mixture_cases(table);
  add_training_cases(table);
  return table;
}

Parity parity(Backend& ops, const OpCase& c, std::uint64_t seed) {
  Workbench w(ops, seed);
  c.prepare(w);
  w.run();
  w.reference();
  Parity worst;
  for (Array& a : w.arrays()) {
    if (!a.compared) continue;
    const double e = w.error(a);
    if (worst.array.empty() || e > worst.error) worst = {e, a.name};
  }
  return worst;
}

}  // namespace mixlora::cases
