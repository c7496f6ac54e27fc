// Parts of newer libraries that the extension brings along (see ../portable.h). None of them has state.
#include <new>
#include <sstream>

#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
// glibc 2.32 says with this whether std::shared_ptr may count without atomic instructions. Here they are always atomic.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded;
}
#endif

#if defined(__GLIBCXX__)
// GCC 9 and 11 moved parts of these into libstdc++. torch brings copies along: of some in 2.11, of all in 2.13.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
