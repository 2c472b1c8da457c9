// Vector types, aligned as CUDA's are.
#pragma once

#define MBF_VECTORS(T, name, align2, align4)                 \
  struct alignas(align2) name##2 { T x, y; };                \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

MBF_VECTORS(char, char, 2, 4)
MBF_VECTORS(unsigned char, uchar, 2, 4)
MBF_VECTORS(short, short, 4, 8)
MBF_VECTORS(unsigned short, ushort, 4, 8)
MBF_VECTORS(int, int, 8, 16)
MBF_VECTORS(unsigned int, uint, 8, 16)
MBF_VECTORS(float, float, 8, 16)
MBF_VECTORS(double, double, 16, 16)
MBF_VECTORS(long long, longlong, 16, 16)
MBF_VECTORS(unsigned long long, ulonglong, 16, 16)

#undef MBF_VECTORS

struct float3 {
  float x, y, z;
};
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
