#include "smoke.cpp"
