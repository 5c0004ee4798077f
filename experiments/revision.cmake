# Writes OUT, a header with the commit that SOURCE is at; only when it changed, so that nothing is built again without need.
# A changed working tree gets "+"; without git, "unknown".
execute_process(COMMAND git -C ${SOURCE} rev-parse --short=10 HEAD
  OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(revision unknown)
else()
  execute_process(COMMAND git -C ${SOURCE} status --porcelain --untracked-files=no OUTPUT_VARIABLE changes ERROR_QUIET)
  if(changes)
    string(APPEND revision "+")
  endif()
endif()
file(CONFIGURE OUTPUT ${OUT} CONTENT
  "#pragma once\n\nnamespace mixlora {\ninline constexpr const char* kRevision = \"${revision}\";\ninline constexpr const char* kVersion = \"${VERSION}\";\n}  // namespace mixlora\n")
