// Catch2 2's main, compiled once (it takes seconds); Catch2 3 brings its own.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
