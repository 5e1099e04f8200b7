//! A pool of threads that share the tasks of one operation.

use std::any::Any;
use std::cell::Cell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread without work polls before it sleeps: longer than the pause between two operations of a layer, far shorter than
/// anything that would disturb others on a shared machine.
const SPIN: Duration = Duration::from_micros(5);

/// Operations with less work than this (in multiply-adds or elements moved) are done by the caller: waking a thread costs more.
const SERIAL_WORK: usize = 1 << 17;

/// The caller and `threads − 1` workers.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Keeps the pool from being shared, so that only one operation runs at a time and a task cannot start another.
    _single_caller: PhantomData<Cell<()>>,
}

struct Shared {
    state: Mutex<State>,
    posted: Condvar,
    finished: Condvar,
    /// Copies of the state's fields of the same names, to poll without the lock; written under it.
    generation: AtomicUsize,
    active: AtomicUsize,
    next_task: AtomicUsize,
}

#[derive(Default)]
struct State {
    /// Counts operations; a worker takes part in each at most once.
    generation: usize,
    job: Option<Job>,
    /// Workers inside the job.
    active: usize,
    sleeping: usize,
    panic: Option<Box<dyn Any + Send>>,
    stop: bool,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    num_tasks: usize,
}

// SAFETY: the closure is Sync, and `Pool::run` keeps it alive while any thread holds the job.
unsafe impl Send for Job {}

impl Pool {
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            posted: Condvar::new(),
            finished: Condvar::new(),
            generation: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            next_task: AtomicUsize::new(0),
        });
        let mut pool = Self { shared, workers: Vec::new(), _single_caller: PhantomData };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("cpu-{index}"));
            pool.workers.push(builder.spawn(move || shared.work_until_stopped())?);
        }
        Ok(pool)
    }

    /// The workers and their caller.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for every i < `num_tasks`, on all threads if `work` (multiply-adds or elements moved, in all) is worth it.
    /// A panic of a task is raised here after all threads have left.
    pub(super) fn run(&self, num_tasks: usize, work: usize, task: &(dyn Fn(usize) + Sync)) {
        if num_tasks <= 1 || work < SERIAL_WORK || self.workers.is_empty() {
            (0..num_tasks).for_each(task);
            return;
        }
        // SAFETY: only the lifetime changes. Workers take the job from the state and count themselves in `active` under the lock;
        // below it is withdrawn and `active` has fallen to zero before this function returns or unwinds.
        let task: *const (dyn Fn(usize) + Sync) =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task) };
        let job = Job { task, num_tasks };
        let shared = &*self.shared;
        let mut state = shared.lock();
        shared.next_task.store(0, Ordering::Relaxed);
        state.job = Some(job);
        state.generation += 1;
        shared.generation.store(state.generation, Ordering::Release);
        let to_wake = state.sleeping.min(num_tasks - 1);
        drop(state);
        for _ in 0..to_wake {
            shared.posted.notify_one();
        }

        let own = catch_unwind(AssertUnwindSafe(|| shared.do_tasks(job)));

        let mut state = shared.lock();
        state.job = None;
        drop(state);
        spin_until(|| shared.active.load(Ordering::Relaxed) == 0);
        let mut state = shared.lock();
        while state.active > 0 {
            state = shared.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let others = state.panic.take();
        drop(state);
        if let Some(panic) = own.err().or(others) {
            resume_unwind(panic);
        }
    }

    /// Calls `op(i, chunk)` for every chunk of `len` elements of `data`, as [`Pool::run`] does.
    pub(super) fn for_chunks<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        work: usize,
        op: impl Fn(usize, &mut [T]) + Sync,
    ) {
        struct Start<T>(*mut T);
        // SAFETY: the pointer is only used for disjoint chunks of a slice of Send elements.
        unsafe impl<T: Send> Sync for Start<T> {}
        let total = data.len();
        let start = Start(data.as_mut_ptr());
        let start = &start;
        self.run(total.div_ceil(len), work, &move |index| {
            let first = index * len;
            // SAFETY: chunks of different indices are disjoint parts of `data`, and `run` calls each index once.
            let chunk = unsafe { std::slice::from_raw_parts_mut(start.0.add(first), len.min(total - first)) };
            op(index, chunk);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.posted.notify_all();
        for worker in self.workers.drain(..) {
            // A worker's panics were caught and raised in `run`; the thread itself ends normally.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn do_tasks(&self, job: Job) {
        // SAFETY: `Pool::run` keeps the closure alive until every thread that took the job has left it.
        let task = unsafe { &*job.task };
        loop {
            let index = self.next_task.fetch_add(1, Ordering::Relaxed);
            if index >= job.num_tasks {
                return;
            }
            task(index);
        }
    }

    fn work_until_stopped(&self) {
        let mut seen = 0;
        loop {
            spin_until(|| self.generation.load(Ordering::Acquire) != seen);
            let mut state = self.lock();
            while state.generation == seen && !state.stop {
                state.sleeping += 1;
                state = self.posted.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.sleeping -= 1;
            }
            if state.stop {
                return;
            }
            seen = state.generation;
            let Some(job) = state.job else { continue };
            state.active += 1;
            self.active.store(state.active, Ordering::Relaxed);
            drop(state);

            let result = catch_unwind(AssertUnwindSafe(|| self.do_tasks(job)));

            let mut state = self.lock();
            state.active -= 1;
            self.active.store(state.active, Ordering::Relaxed);
            if let Err(panic) = result {
                state.panic = Some(panic);
            }
            if state.active == 0 {
                self.finished.notify_one();
            }
        }
    }
}

fn spin_until(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() && start.elapsed() < SPIN {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(3).unwrap();
        for num_tasks in [0, 1, 2, 7, 100] {
            let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(num_tasks, usize::MAX, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn chunks_cover_a_ragged_slice() {
        let pool = Pool::new(2).unwrap();
        let mut data = vec![0; 103];
        pool.for_chunks(&mut data, 10, usize::MAX, |index, chunk| chunk.fill(index + 1));
        assert!(data.iter().enumerate().all(|(i, &value)| value == i / 10 + 1));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(2).unwrap();
        for bad in 0..64 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, usize::MAX, &|i| assert_ne!(i, bad));
            }));
            assert!(result.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(64, usize::MAX, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 63 * 64 / 2);
    }

    #[test]
    fn little_work_stays_on_the_caller() {
        let pool = Pool::new(4).unwrap();
        let caller = std::thread::current().id();
        pool.run(100, SERIAL_WORK - 1, &|_| assert_eq!(std::thread::current().id(), caller));
    }
}
