//! What an export or a job holds on a disk: a swappable reference to the node at the top.
//!
//! ```text
//! export, job ──► Root ──► Node ──► Driver ──► backing Node ──► …
//!                  │        └ replaced under the gate: snapshot, stream, commit, mirror
//!                  └ gate: whoever issues requests through the root is a party of it
//! ```
//!
//! A node is a *place* with a name; several roots, and other nodes, may stand on it. A root is
//! *who uses it*. So the gate is the root's: closing it stops one user, and whoever wants a node
//! quiet closes the gates of all roots that reach it ([`Graph::quiesce`](crate::block::Graph)).
//!
//! A root also remembers whose guest it serves ([`Root::begin_session`]), because what is kept for
//! that guest across a kill must be kept by whichever driver is on top ([`crate::block::keep`]).
//!
//! Invariant: the node is replaced only while the gate is closed, so a party may cache the node
//! and its driver from one opening of the gate to the next.

use std::fmt;
use std::sync::{Arc, Mutex, RwLock};

use crate::block::driver::Driver;
use crate::block::gate::{Gate, Quiesced};
use crate::block::keep::Keep;
use crate::block::node::Node;
use crate::error::Result;
use crate::io::block_on;

/// A user's reference to a disk. Cheap to clone; clones are the same root.
#[derive(Clone)]
pub struct Root {
    inner: Arc<RootInner>,
}

struct RootInner {
    name: String,
    /// See [`Root::unit`].
    unit: u64,
    /// Replaced only while the gate is closed.
    node: RwLock<Node>,
    gate: Gate,
    /// The guest's session that runs, if what it writes must outlive this process. Locked while one
    /// begins or goes on elsewhere, so that the node is the one it runs on.
    session: Mutex<Option<Session>>,
}

/// A guest's session.
struct Session {
    nonce: u128,
    /// Hears whether completed writes may be in a keep only. Absent while the guest has not come back to
    /// this process: then it counts on finding its name.
    note_kept: Option<Box<dyn Fn(bool) + Send>>,
}

impl Session {
    /// Starts or continues it on a driver.
    fn begin(&self, driver: &dyn Driver) -> Result<()> {
        let Some(note_kept) = &self.note_kept else {
            return driver.keep().map_or(Ok(()), |keep| keep.bear(self.nonce));
        };
        driver.begin_session(self.nonce)?;
        note_kept(driver.keep().and_then(Keep::session) == Some(self.nonce));
        Ok(())
    }
}

impl Root {
    /// A root called `name` (an export, a job) on `node`.
    ///
    /// Its user asks the node what requests it takes.
    pub fn new(name: impl Into<String>, node: Node) -> Root {
        Root::with_unit(name, node, u64::MAX)
    }

    /// The same for a user who was told once that requests may be multiples of `unit` bytes.
    pub fn with_unit(name: impl Into<String>, node: Node, unit: u64) -> Root {
        Root {
            inner: Arc::new(RootInner {
                name: name.into(),
                unit,
                node: RwLock::new(node),
                gate: Gate::new(),
                session: Mutex::default(),
            }),
        }
    }

    /// Whose root it is.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What its requests are multiples of, in bytes. It is not put on a node that demands more.
    pub fn unit(&self) -> u64 {
        self.inner.unit
    }

    /// The node as of now. Parties load it again when the gate's generation has changed.
    pub fn node(&self) -> Node {
        self.inner.node.read().unwrap().clone()
    }

    /// The gate of everybody who issues requests through this root.
    pub fn gate(&self) -> &Gate {
        &self.inner.gate
    }

    /// Closes the gate and waits until nothing is in flight; see [`Gate::quiesce`].
    pub fn quiesce(&self) -> Quiesced {
        self.inner.gate.quiesce()
    }

    /// Whether both handles are the same root.
    pub fn is_same(&self, other: &Root) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Puts the root on another node. The guest's session, if one runs, goes on there: from the
    /// moment the gate opens its writes are kept by the new node's driver.
    ///
    /// # Errors
    /// If the new driver cannot keep a session. Then the root stays where it is.
    pub fn replace_node(&self, node: Node, _quiesced: &Quiesced) -> Result<Node> {
        // Until the node is another: a session that begins meanwhile would begin on the old one.
        let session = self.inner.session.lock().unwrap();
        if let Some(session) = &*session {
            session.begin(&*node.driver())?;
        }
        let is_awaited = session.as_ref().is_some_and(|session| session.note_kept.is_none());
        let new = node.driver();
        let before = std::mem::replace(&mut *self.inner.node.write().unwrap(), node);
        if is_awaited {
            leave(&*before.driver(), &*new);
        }
        Ok(before)
    }

    /// The node has another driver than `before` now, and the guest's session, if one runs, goes on there.
    ///
    /// # Errors
    /// If the new driver cannot keep a session.
    pub fn renew_session(&self, before: &dyn Driver, _quiesced: &Quiesced) -> Result<()> {
        let session = self.inner.session.lock().unwrap();
        let Some(session) = &*session else { return Ok(()) };
        let now = self.node().driver();
        session.begin(&*now)?;
        if session.note_kept.is_none() {
            leave(before, &*now);
        }
        Ok(())
    }

    /// A guest of an earlier process may still come back to this disk, though nothing is kept for it but
    /// its name, because it had flushed. Whatever becomes of the disk meanwhile, it is to find that name.
    pub fn await_guest(&self) {
        let mut known = self.inner.session.lock().unwrap();
        let driver = self.node().driver();
        let named = driver.keep().filter(|keep| !keep.is_recording() && keep.awaited().is_none());
        if let Some(nonce) = named.and_then(Keep::session) {
            let session = Session { nonce, note_kept: None };
            if session.begin(&*driver).is_ok() {
                *known = Some(session);
            }
        }
    }

    /// Settles what becomes of what an earlier process kept (see [`Driver::resume`]), and ends the
    /// session that ran here. No request may be in flight.
    ///
    /// [`Driver::resume`]: crate::block::Driver::resume
    pub fn resume(&self, nonce: Option<u128>) -> Result<()> {
        *self.inner.session.lock().unwrap() = None;
        block_on(self.node().driver().resume(nonce))
    }

    /// Starts the session of a guest whose writes must outlive this process. `note_kept` is told,
    /// now and whenever that changes, whether completed writes may be in the driver's keep and
    /// nowhere else; it is told before the first of them completes.
    pub fn begin_session(
        &self,
        nonce: u128,
        note_kept: impl Fn(bool) + Send + 'static,
    ) -> Result<()> {
        let session = Session { nonce, note_kept: Some(Box::new(note_kept)) };
        // Whoever changes the graph finds it either known here, or not begun anywhere.
        let mut known = self.inner.session.lock().unwrap();
        session.begin(&*self.node().driver())?;
        *known = Some(session);
        Ok(())
    }

    /// The guest has gone, and everything that it saw completed is durable: nothing needs to be
    /// kept for it any more.
    pub fn end_session(&self) {
        let mut known = self.inner.session.lock().unwrap();
        // One that has not come back has nothing to do with whoever has gone.
        if let Some(note_kept) = known.as_ref().and_then(|session| session.note_kept.as_ref()) {
            note_kept(false);
            *known = None;
        }
    }

    /// The session of a guest of an earlier process that has not come back ([`Root::await_guest`]).
    pub fn awaited(&self) -> Option<u128> {
        let known = self.inner.session.lock().unwrap();
        known.as_ref().filter(|session| session.note_kept.is_none()).map(|session| session.nonce)
    }

    /// The session that runs, or is awaited.
    pub fn session(&self) -> Option<u128> {
        self.inner.session.lock().unwrap().as_ref().map(|session| session.nonce)
    }
}

/// A disk whose guest may still come back has gone from one driver to another: what names that guest is
/// there, and no more here.
fn leave(before: &dyn Driver, now: &dyn Driver) {
    let Some(keep) = before.keep() else { return };
    if now.keep().is_some_and(|now| std::ptr::eq(now, keep)) || keep.is_recording() {
        return;
    }
    if let Err(err) = keep.forget() {
        tracing::warn!("{}: {err}", keep.path().display());
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({}, {:?})", self.name(), self.node())
    }
}
