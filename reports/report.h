// Report: the tables of a sweep, from the store.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "experiments/store/database.h"
#include "reports/table.h"

namespace mixlora {

/// The last sweep's row in a store; throws InputError when there is none.
std::int64_t last_sweep(Database& db);
/// "accuracy", "params", "efficiency" or "expert-load"; unfinished trials show their state.
Table build_table(Database& db, std::int64_t sweep, const std::string& name);

}  // namespace mixlora
