//! Making new images.

use std::sync::Arc;

use imago::format::drivers::FormatDriverInstance;
use imago::{DenyImplicitOpenGate, FormatCreateBuilder, FormatDriverBuilder};

use super::disk::Disk;
use super::store::Store;
use super::{BLOCK, Backing, Imago, checkpoint};
use crate::error::{Error, Result, ResultExt};
use crate::io::{File, HostKind};

/// How many entries imago, and QEMU, let an L1 table have. One stands for an L2 table of a cluster.
const MAX_L1_ENTRIES: u64 = 4 << 20;

/// How to create an image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes; a multiple of 512. An image of 0 bytes can be made larger.
    pub size: u64,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount in bits: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// The backing file to name in the header; the format must be given. Not opened or checked.
    pub backing: Option<Backing>,
}

impl CreateOptions {
    /// An image of `size` bytes with 64 KiB clusters, as `qemu-img create` makes it.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions { size, cluster_size: 65536, refcount_bits: 16, backing: None }
    }

    /// Checks everything but the size and the backing file.
    ///
    /// # Errors
    /// Names the option, what was given and what is allowed.
    pub fn check(&self) -> Result<()> {
        let CreateOptions { cluster_size, refcount_bits, .. } = self;
        if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(cluster_size) {
            return Err(Error::invalid(format!(
                "cluster size {cluster_size} is not a power of two from 512 to 2097152"
            )));
        }
        if !refcount_bits.is_power_of_two() || *refcount_bits > 64 {
            return Err(Error::invalid(format!(
                "refcount width {refcount_bits} is not a power of two from 1 to 64"
            )));
        }
        Ok(())
    }
}

/// A new image that is laid out, and of which nothing is in the file yet.
#[derive(Debug)]
pub struct NewImage {
    disk: Arc<Disk>,
    store: Store,
}

impl NewImage {
    /// Lays out an image for `file`. What that holds counts for nothing, and stays as it is.
    ///
    /// # Errors
    /// Names the file, the option and what is allowed.
    pub async fn lay_out(file: Arc<dyn File>, options: &CreateOptions) -> Result<NewImage> {
        let name = file.name().to_string();
        lay_out(file, options).await.context(|| cannot_create(&name))
    }

    /// How long the file will be.
    pub fn file_len(&self) -> u64 {
        self.store.end()
    }

    /// Writes the image to its file, which must be empty by now, or a device. What a power cut leaves
    /// of a half-made image is not taken for one: the header comes last.
    ///
    /// # Errors
    /// Names the file.
    pub async fn write(&self) -> Result<()> {
        let file = self.disk.file();
        let is_device = file.as_host().is_some_and(|host| host.kind() == HostKind::BlockDevice);
        let written = async {
            if !is_device && file.len()? > 0 {
                return Err(Error::invalid("the file is not empty"));
            }
            checkpoint::write_new(&self.disk, &self.store).await
        };
        written.await.context(|| cannot_create(file.name()))
    }
}

fn cannot_create(name: &str) -> String {
    format!("{name}: cannot create the image")
}

async fn lay_out(file: Arc<dyn File>, options: &CreateOptions) -> Result<NewImage> {
    options.check()?;
    let CreateOptions { size, cluster_size, refcount_bits, backing } = options;
    if !size.is_multiple_of(BLOCK) {
        return Err(Error::invalid(format!("size {size} is not a multiple of {BLOCK}")));
    }
    let max = MAX_L1_ENTRIES * (cluster_size / 8) * cluster_size;
    if *size > max {
        return Err(Error::invalid(format!(
            "size {size} is too large for clusters of {cluster_size} bytes, which go up to {max}; use a \
             larger cluster_size (at most 2M)"
        )));
    }
    let disk = Arc::new(Disk::new(file));
    let store = Store::for_new(Arc::clone(&disk), *cluster_size);
    let mut builder = Imago::create_builder(store.clone())
        .size(*size)
        .cluster_size(*cluster_size as usize)
        .refcount_width(*refcount_bits as usize);
    if let Some(backing) = backing {
        let Some(format) = &backing.format else {
            return Err(Error::invalid(format!(
                "the format of backing file '{}' is not given",
                backing.file
            )));
        };
        if backing.file.is_empty() || backing.file.len() > 1023 {
            return Err(Error::invalid("backing file name must have 1 to 1023 bytes"));
        }
        builder = builder.backing(backing.file.clone(), format.clone());
    }
    let image = builder
        .create_open(DenyImplicitOpenGate::default(), |image| {
            Ok(Imago::builder(image).backing(None).write(true))
        })
        .await?;
    image.flush().await?;
    Ok(NewImage { disk, store })
}
