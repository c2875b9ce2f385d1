//! Making new images.

use std::sync::Arc;

use imago::format::drivers::FormatDriverInstance;
use imago::{DenyImplicitOpenGate, FormatCreateBuilder, FormatDriverBuilder};

use super::disk::Disk;
use super::store::Store;
use super::{BLOCK, Backing, Imago, checkpoint};
use crate::error::{Error, Result, ResultExt};
use crate::io::File;

/// How to create an image.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes; a multiple of 512, not 0.
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

/// Makes an empty file into an image. What a power cut leaves of a half-made image is not taken for
/// one: the header comes last.
///
/// # Errors
/// Names the file, the option and what is allowed. A file that is not empty is refused.
pub async fn create(file: Arc<dyn File>, options: &CreateOptions) -> Result<()> {
    let name = file.name().to_string();
    create_unnamed(file, options).await.context(|| format!("{name}: cannot create the image"))
}

async fn create_unnamed(file: Arc<dyn File>, options: &CreateOptions) -> Result<()> {
    options.check()?;
    let CreateOptions { size, cluster_size, refcount_bits, backing } = options;
    if *size == 0 || size % BLOCK != 0 {
        return Err(Error::invalid(format!("size {size} is not a positive multiple of {BLOCK}")));
    }
    if file.len()? > 0
        && file.as_host().is_none_or(|host| host.kind() == crate::io::HostKind::Regular)
    {
        return Err(Error::invalid("the file is not empty"));
    }
    let disk = Arc::new(Disk::new(Arc::clone(&file)));
    let store = Store::new(Arc::clone(&disk), *cluster_size);
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
    checkpoint::write_new(&disk, &store).await
}
