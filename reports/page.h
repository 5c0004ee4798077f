// Page: a study as one HTML file that needs nothing else.
#pragma once
#include <string>

#include "reports/report.h"

namespace mixlora {

/// All tables and charts of a study; html/page.html and its neighbours are the template.
std::string render_page(const Study& study, const ReportOptions& options);

}  // namespace mixlora
