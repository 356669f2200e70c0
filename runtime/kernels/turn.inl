// Sixteen rows of sixteen become columns. Included inside a namespace of its own, behind a `Vector`.
inline void turn(Vector* v) {
  float rows[16][16];
  float columns[16][16];
  for (int i = 0; i < 16; ++i) store(rows[i], v[i]);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) columns[i][j] = rows[j][i];
  }
  for (int i = 0; i < 16; ++i) v[i] = load(columns[i]);
}
