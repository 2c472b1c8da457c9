// What lets a shared object that was linked on a new Linux load wherever torch's own wheels do: glibc 2.28, GCC 8's
// libstdc++. tests/wheel/audit.py fails a wheel that asks for more.

#include <new>
#include <sstream>

// A linker binds each name to the newest version that its glibc has. setup.py wraps the names below (ld's --wrap), and
// each wrapper jumps to the version that x86-64 has had from the start. exp and hypot are of mbf._C, dlopen and dlsym
// of both, and the rest is what the CUDA runtime inside mbf._cuda calls.
#if defined(__x86_64__) && defined(__gnu_linux__)
asm(R"(
.macro wrap version, names:vararg
.irp name, \names
.section .text.wrap.\name, "ax", @progbits
.symver first_\name, \name@\version
.globl __wrap_\name
.hidden __wrap_\name
.type __wrap_\name, @function
__wrap_\name:
jmp first_\name@PLT
.size __wrap_\name, . - __wrap_\name
.endr
.endm
wrap GLIBC_2.2.5, exp, hypot
wrap GLIBC_2.2.5, dlclose, dlerror, dlopen, dlsym, dlvsym
wrap GLIBC_2.3.4, dlmopen
wrap GLIBC_2.2.5, pthread_create, pthread_detach, pthread_join, pthread_kill, pthread_once
wrap GLIBC_2.2.5, pthread_getspecific, pthread_setspecific, pthread_key_create, pthread_key_delete
wrap GLIBC_2.2.5, pthread_condattr_setpshared, pthread_mutex_trylock
wrap GLIBC_2.2.5, pthread_mutexattr_init, pthread_mutexattr_destroy, pthread_mutexattr_setpshared
wrap GLIBC_2.2.5, pthread_mutexattr_settype
wrap GLIBC_2.2.5, pthread_rwlock_init, pthread_rwlock_destroy, pthread_rwlock_unlock
wrap GLIBC_2.2.5, pthread_rwlock_rdlock, pthread_rwlock_tryrdlock, pthread_rwlock_timedrdlock
wrap GLIBC_2.2.5, pthread_rwlock_wrlock, pthread_rwlock_trywrlock, pthread_rwlock_timedwrlock
wrap GLIBC_2.2.5, pthread_rwlockattr_init, pthread_rwlockattr_destroy, pthread_rwlockattr_setpshared
wrap GLIBC_2.2.5, pthread_spin_init, pthread_spin_destroy, pthread_spin_lock, pthread_spin_trylock, pthread_spin_unlock
wrap GLIBC_2.2.5, sem_init, sem_destroy, sem_post, sem_wait, sem_trywait, sem_timedwait, shm_open, shm_unlink
.text
)");
#endif

// These C++ names are younger than GCC 8. torch's libraries happen to export some of them, which a linker would take;
// here are copies of our own, kept inside the object by csrc/portable.map.
template class std::basic_stringbuf<char>;
template class std::basic_stringstream<char>;
template class std::basic_ostringstream<char>;

namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;  // never: it would only save atomic operations
