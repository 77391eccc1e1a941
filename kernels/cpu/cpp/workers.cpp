// Runs lists of calls on threads that live as long as the process, and on the calling thread. A thread takes the next call
// as soon as it is free, so a core that other programs slow down takes fewer calls. A call may wait for earlier calls. No
// lock of Python's is held or needed.
//
// Waking a sleeping thread takes 0.1 ms and more. So after a list a worker looks for the next one for AWAKE before it
// sleeps, and yields its core meanwhile. The workers have the default treatment of denormal numbers.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unistd.h>

#include "entry.h"

namespace {

constexpr auto AWAKE = std::chrono::milliseconds(2);

struct Call {
    int32_t (*work)(const void *);
    const void *arguments;
    int32_t first, last;  // it waits for the calls `first` to `last` - 1, which come before it in the list
};

class List {
  public:
    List(const Call *calls, int32_t count) : calls(calls), count(count), ended(new std::atomic<bool>[count]()) {}

    // Takes calls until none is left. No thread waits forever: the calls that it waits for were taken before, by threads
    // that run them or wait for still earlier ones.
    void take_all() {
        for (int32_t i; (i = next.fetch_add(1)) < count;) {
            const Call &call = calls[i];
            for (int32_t before = call.first; before < call.last; before++)
                while (!ended[before]) std::this_thread::yield();
            const bool vain = failed && call.first < call.last;  // skip it: its inputs may be missing
            if (!vain) note(i, call.work(call.arguments));
            ended[i] = true;
        }
    }

    // Returns 0, or for the first call that failed its code in bits 0 to 7 and its number above.
    int32_t failure() const { return failed; }

  private:
    const Call *calls;
    const int32_t count;
    const std::unique_ptr<std::atomic<bool>[]> ended;
    std::atomic<int32_t> next{0};
    std::atomic<int32_t> failed{0};

    void note(int32_t i, int32_t code) {
        int32_t none = 0;
        if (code) failed.compare_exchange_strong(none, i << 8 | code);
    }
};

// True if every call waits only for earlier calls.
bool fits(const Call *calls, int32_t count, int32_t threads) {
    if (count < 0 || threads < 1) return false;
    for (int32_t i = 0; i < count; i++)
        if (!calls[i].work || calls[i].first < 0 || calls[i].last > i || calls[i].first > calls[i].last) return false;
    return true;
}

class Worker {
  public:
    Worker() { std::thread([this] { live(); }).detach(); }

    void offer(List *list) {
        offered = list;
        if (!asleep) return;
        std::lock_guard<std::mutex> held(mutex);
        woken.notify_one();
    }

    // Takes the list back, or waits until this worker has finished it.
    void withdraw(List *list) {
        List *expected = list;
        if (offered.compare_exchange_strong(expected, nullptr)) return;
        while (offered) std::this_thread::yield();
    }

  private:
    std::atomic<List *> offered{nullptr};
    std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable woken;

    static List *taken() { return (List *)1; }  // value of `offered` while this worker works on a list

    void live() {
        for (;;) {
            List *list = awaited();
            if (!list || !offered.compare_exchange_strong(list, taken())) continue;  // it was withdrawn
            list->take_all();
            offered = nullptr;
        }
    }

    List *awaited() {
        const auto until = std::chrono::steady_clock::now() + AWAKE;
        do {
            for (int i = 0; i < 64; i++) {
                if (List *list = offered) return list;
                std::this_thread::yield();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> held(mutex);
        asleep = true;
        woken.wait(held, [this] { return offered != nullptr; });
        asleep = false;
        return offered;
    }
};

// The workers of a process. A forked process has its parent's memory, but not its threads, so it needs new workers.
struct Workers {
    std::atomic<bool> busy{false};
    std::deque<Worker> all;
    pid_t process = getpid();
};

Workers &workers() {
    static std::mutex mutex;
    static Workers *current = nullptr;  // never freed: its threads end with the process
    std::lock_guard<std::mutex> held(mutex);
    if (!current || current->process != getpid()) current = new Workers;
    return *current;
}

// A list of calls that is running.
class Running {
  public:
    // Starts the list on at most `threads` threads, the caller's included; on the caller's alone if another list has the
    // workers.
    Running(const Call *calls, int32_t count, int32_t threads)
        : list(calls, count), shared(workers()), held(threads > 1 && count > 1 && !shared.busy.exchange(true)) {
        if (!held) return;
        const size_t others = (threads < count ? threads : count) - 1;
        try {
            while (shared.all.size() < others) shared.all.emplace_back();
        } catch (...) {
            // No more threads can be started: the existing ones do the work.
        }
        helping = others < shared.all.size() ? others : shared.all.size();
        for (size_t i = 0; i < helping; i++) shared.all[i].offer(&list);
    }

    // Helps until all calls have ended. Returns the failure, as `List::failure`.
    int32_t end() {
        list.take_all();
        for (size_t i = 0; i < helping; i++) shared.all[i].withdraw(&list);
        if (held) shared.busy = false;
        return list.failure();
    }

  private:
    List list;
    Workers &shared;
    const bool held;  // whether this list has the workers, until the end
    size_t helping = 0;
};

}  // namespace

EXPORT_SIZE(Call, Call)

extern "C" {
// Starts the calls and sets `running`. The caller must pass it to `end`, in the same process, even after an error.
int32_t begin(const Call *calls, int32_t count, int32_t threads, Running **running) noexcept {
    return guarded(fits(calls, count, threads), [&] { *running = new Running(calls, count, threads); });
}

// Waits for all calls. Returns 0, or the failure of a call, as `List::failure`.
int32_t end(Running *running) noexcept {
    const std::unique_ptr<Running> list(running);
    return list ? list->end() : DONE;
}
}
