//! What an operation keeps until the host is done with it, besides its file and memory.
//!
//! A future may be dropped at any await, and what it has given to the host is carried out all the
//! same. So whatever says that nobody else goes where that lands (a lock on a range, a pin on a
//! place in a file) must not be given up with the future. It travels with the operation instead:
//!
//! ```text
//! carrying(guard, file.write(…))      the guard is held by the future
//!               └─► operation         and by what the host was given, until it is done
//! ```
//!
//! Every operation that is started while the future is polled takes the guard along, however many
//! layers further down that is. Loads of an outer and an inner future add up.
//!
//! Invariant: a load that is let go of by a completion is dropped on the thread of its reactor, with
//! nothing of the reactor's borrowed: it may wake tasks.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;

use smallvec::SmallVec;

/// Anything whose life keeps something as it is.
pub type Load = Arc<dyn Send + Sync>;

/// What one operation carries.
#[derive(Default)]
pub(super) struct Loads(SmallVec<[Load; 2]>);

impl std::fmt::Debug for Loads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Loads({})", self.0.len())
    }
}

thread_local! {
    /// Of the futures that are being polled, outermost first.
    static LOADS: RefCell<Vec<Load>> = const { RefCell::new(Vec::new()) };
}

/// Runs `future`, and has each operation that it starts keep `load` until the host is done with it.
/// Tasks that it spawns carry nothing.
pub async fn carrying<T>(load: Load, future: impl Future<Output = T>) -> T {
    /// Takes the load off again, whatever the poll does.
    struct Loaded;
    impl Drop for Loaded {
        fn drop(&mut self) {
            // Dropped outside of the borrow: it may be the last, and wake somebody.
            drop(LOADS.with_borrow_mut(|loads| loads.pop()));
        }
    }
    let mut future = pin!(future);
    poll_fn(|cx| {
        LOADS.with_borrow_mut(|loads| loads.push(Arc::clone(&load)));
        let _loaded = Loaded;
        future.as_mut().poll(cx)
    })
    .await
}

/// What an operation that is started now carries.
pub(super) fn now() -> Loads {
    LOADS.with_borrow(|loads| Loads(loads.iter().cloned().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::{Sim, SimFile, SimTask};
    use crate::io::{AlignedBuf, File};

    #[test]
    fn loads_are_held_until_the_host_is_done() {
        let sim = Sim::new(0);
        let file = SimFile::from_bytes("disk", vec![0; 1024]);
        sim.attach(&file);
        let (outer, inner): (Arc<u8>, Arc<u8>) = (Arc::new(1), Arc::new(2));
        let memory = AlignedBuf::zeroed(512, 1);
        let write = carrying(inner.clone(), file.write(0, memory.buffers(), false));
        let both = async {
            carrying(outer.clone(), write).await.unwrap();
            file.write(512, memory.buffers(), false).await.unwrap();
        };
        sim.run_until(vec![Box::pin(both) as SimTask<'_>], |_| sim.pending() > 0);
        // The future is gone.
        assert_eq!([Arc::strong_count(&outer), Arc::strong_count(&inner)], [2, 2]);
        sim.drain();
        assert_eq!([Arc::strong_count(&outer), Arc::strong_count(&inner)], [1, 1]);
        // What comes after it carries nothing.
        let after = async {
            carrying(outer.clone(), async {}).await;
            file.write(512, memory.buffers(), false).await.unwrap();
        };
        sim.run_until(vec![Box::pin(after) as SimTask<'_>], |_| sim.pending() > 0);
        assert_eq!((sim.pending(), Arc::strong_count(&outer)), (1, 1));
        assert!(now().0.is_empty());
    }
}
