// Calls shared out among threads that stay, the caller being one: each takes the next call that nobody has taken, so a
// core that others slow down does less. A call may wait for some before it. Nothing of Python is held or waited for.
//
// Between two lists of calls of one training step a worker looks for the next for a while before it sleeps: to be woken
// takes a tenth of a millisecond and more. It gives way to whoever else wants its core. How a thread treats denormal
// numbers is its own: these leave it as it is by default.
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
    int32_t first, last;  // once those from `first` to before `last` have ended, which stand before it in the list
};

class List {
  public:
    List(const Call *calls, int32_t count) : calls(calls), count(count), ended(new std::atomic<bool>[count]()) {}

    // None waits forever: what it waits for has been taken, by a thread that works on it or waits for one before that.
    void take_all() {
        for (int32_t i; (i = next.fetch_add(1)) < count;) {
            const Call &call = calls[i];
            for (int32_t before = call.first; before < call.last; before++)
                while (!ended[before]) std::this_thread::yield();
            const bool vain = failed && call.first < call.last;  // what it needs may be missing
            if (!vain) note(i, call.work(call.arguments));
            ended[i] = true;
        }
    }

    // 0, or the code of a call that failed first, and above it (from bit 8 on) its number.
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

// Each call waits for calls before it alone.
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

    // Returns when this worker neither has the list nor will take it.
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

    static List *taken() { return (List *)1; }  // in place of a list that is being worked on

    void live() {
        for (;;) {
            List *list = awaited();
            if (!list || !offered.compare_exchange_strong(list, taken())) continue;  // withdrawn meanwhile
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

// Of a process; a fork has the memory of its parent's, but not the threads.
struct Workers {
    std::atomic<bool> busy{false};
    std::deque<Worker> all;
    pid_t process = getpid();
};

Workers &workers() {
    static std::mutex mutex;
    static Workers *own = nullptr;  // never freed: its threads end with the process
    std::lock_guard<std::mutex> held(mutex);
    if (!own || own->process != getpid()) own = new Workers;
    return *own;
}

// A list that threads beside the caller have begun.
class Running {
  public:
    // By so many threads at most, the caller's among them; by that alone where another has the workers.
    Running(const Call *calls, int32_t count, int32_t threads)
        : list(calls, count), own(workers()), held(threads > 1 && count > 1 && !own.busy.exchange(true)) {
        if (!held) return;
        const size_t others = (threads < count ? threads : count) - 1;
        try {
            while (own.all.size() < others) own.all.emplace_back();
        } catch (...) {
            // No more threads are to be had: those that there are do the work.
        }
        helping = others < own.all.size() ? others : own.all.size();
        for (size_t i = 0; i < helping; i++) own.all[i].offer(&list);
    }

    // What is left of it. Returns its failure.
    int32_t end() {
        list.take_all();
        for (size_t i = 0; i < helping; i++) own.all[i].withdraw(&list);
        if (held) own.busy = false;
        return list.failure();
    }

  private:
    List list;
    Workers &own;
    const bool held;  // the workers, until the end
    size_t helping = 0;
};

}  // namespace

EXPORT_SIZE(Call, Call)

extern "C" {
// Begins the calls. What `running` then points to is for `end`, whatever happens meanwhile, and in this process.
int32_t begin(const Call *calls, int32_t count, int32_t threads, Running **running) noexcept {
    return guarded(fits(calls, count, threads), [&] { *running = new Running(calls, count, threads); });
}

// Returns 0, or the failure of one of the calls.
int32_t end(Running *running) noexcept {
    const std::unique_ptr<Running> own(running);
    return own ? own->end() : DONE;
}
}
