// HellaSwag's texts as lm-evaluation-harness cleans them [lm_eval/tasks/hellaswag/utils.py].
#pragma once
#include <string>
#include <string_view>

namespace mixlora {

/// Strips, turns " [title]" into ". ", deletes "[...]", makes two spaces one, in this order.
std::string clean_hellaswag(std::string_view text);
/// A row's ctx with its last part (ctx_b) capitalised. Rows keep ctx whole: WikiHow's have no
/// ctx_b; elsewhere it is what follows the last sentence.
std::string capitalise_hellaswag(std::string_view activity, std::string_view ctx);

}  // namespace mixlora
