// Calls shared out among threads that stay, the caller being one: each takes the next call that nobody has taken, so a
// core that others slow down does less. Nothing of Python is held or waited for.
//
// Between two rounds of one training step a worker looks for the next for a while before it sleeps: to be woken takes a
// tenth of a millisecond and more, ten times a step. It gives way to whoever else wants its core. How a thread treats
// denormal numbers is its own: these leave it as it is by default.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <unistd.h>

namespace {

constexpr auto AWAKE = std::chrono::milliseconds(2);

using Work = int32_t (*)(const void *);

struct Round {
    Work work;
    const void *const *arguments;
    int32_t count;
    std::atomic<int32_t> next{0}, failed{0};

    void take_all() {
        for (int32_t i; (i = next.fetch_add(1)) < count;)
            if (work(arguments[i])) failed = 1;
    }
};

class Worker {
  public:
    Worker() { std::thread([this] { live(); }).detach(); }

    void offer(Round *round) {
        offered = round;
        if (!asleep) return;
        std::lock_guard<std::mutex> held(mutex);
        woken.notify_one();
    }

    // Returns when this worker neither has the round nor will take it.
    void withdraw(Round *round) {
        Round *expected = round;
        if (offered.compare_exchange_strong(expected, nullptr)) return;
        while (offered) std::this_thread::yield();
    }

  private:
    std::atomic<Round *> offered{nullptr};
    std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable woken;

    static Round *taken() { return (Round *)1; }  // in place of a round that is being worked on

    void live() {
        for (;;) {
            Round *round = awaited();
            if (!round || !offered.compare_exchange_strong(round, taken())) continue;  // withdrawn meanwhile
            round->take_all();
            offered = nullptr;
        }
    }

    Round *awaited() {
        const auto until = std::chrono::steady_clock::now() + AWAKE;
        do {
            for (int i = 0; i < 64; i++) {
                if (Round *round = offered) return round;
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
    std::mutex busy;
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

}  // namespace

extern "C" {
// work(arguments[i]) for all i < count, by so many threads at most; by this one alone where another has the workers.
// Returns 0, or 1 where one of them does.
int32_t share_out(Work work, const void *const *arguments, int32_t count, int32_t threads) noexcept {
    Round round{work, arguments, count};
    Workers &own = workers();
    std::unique_lock<std::mutex> held(own.busy, std::defer_lock);
    size_t helping = 0;
    if (threads > 1 && count > 1 && held.try_lock()) {
        const size_t others = (threads < count ? threads : count) - 1;
        try {
            while (own.all.size() < others) own.all.emplace_back();
        } catch (...) {
            // No more threads are to be had: those that there are do the work.
        }
        helping = others < own.all.size() ? others : own.all.size();
    }
    for (size_t i = 0; i < helping; i++) own.all[i].offer(&round);
    round.take_all();
    for (size_t i = 0; i < helping; i++) own.all[i].withdraw(&round);
    return round.failed;
}
}
